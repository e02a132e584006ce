"""Move a node to another account, with the consent of both.

The present account signs the contract's message about the move; the other account sends that
signature to the contract in its own transaction. The service signs for people who are signed in at
the page. People who use their exported key sign themselves, and send the signatures to the API.
"""

import logging

from aiohttp import web
from eth_account import Account as EthAccount
from eth_account.messages import encode_defunct

from worker.account import releases, request_bodies
from worker.account.account_pages import require_fresh
from worker.account.accounts import Account, node_unknown, require_active
from worker.account.releases import Release
from worker.account.request_bodies import Refused
from worker.account.site import Form, Site, Visitor, see, text_of
from worker.chain import peer_proof

log = logging.getLogger(__name__)


class Moves:
    """`/nodes/release`, `/nodes/take` and `/nodes/keep`, and the calls for signatures."""

    def __init__(self, site: Site) -> None:
        self._site = site

    def add_to(self, application: web.Application) -> None:
        site, router = self._site, application.router
        router.add_post("/nodes/release", site.signed_in(self.release, is_post=True))
        router.add_post("/nodes/take", site.signed_in(self.take, is_post=True))
        router.add_post("/nodes/keep", site.signed_in(self.keep, is_post=True))
        router.add_post("/api/release-peer", self.release_signed)
        router.add_post("/api/take-peer", self.take_signed)

    # ---- at the page

    async def release(
        self,
        request: web.Request,
        visitor: Visitor,
        form: Form,
    ) -> web.Response:
        require_fresh(visitor)
        await self._site.in_thread(
            self._release, visitor.account, text_of(form, "peer"), text_of(form, "to", 60), None
        )
        return see("/")

    async def take(
        self,
        request: web.Request,
        visitor: Visitor,
        form: Form,
    ) -> web.Response:
        await self._site.in_thread(self._take, visitor.account, text_of(form, "peer"))
        return see("/")

    async def keep(
        self,
        request: web.Request,
        visitor: Visitor,
        form: Form,
    ) -> web.Response:
        """Withdraw a release (as its holder), or refuse it (as its taker)."""
        await self._site.in_thread(
            releases.forget, self._site.accounts, text_of(form, "peer"), visitor.account
        )
        return see("/")

    # ---- with signatures of exported keys

    async def release_signed(self, request: web.Request) -> web.Response:
        await self._site.count_begun(request)
        body = request_bodies.parse(request_bodies.SignedMove, await request.read())
        await self._site.in_thread(self._release_signed, body)
        return web.json_response({"released": True})

    async def take_signed(self, request: web.Request) -> web.Response:
        await self._site.count_begun(request)
        body = request_bodies.parse(request_bodies.SignedMove, await request.read())
        await self._site.in_thread(self._take_signed, body)
        return web.json_response({"moved": True})

    def _release_signed(self, body: request_bodies.SignedMove) -> None:
        node = self._site.accounts.node(body.peer_id)
        if node is None:
            raise node_unknown()
        holder = self._site.accounts.by_id(node.account_id)
        signature = self._require_signed(body, holder.address)
        self._release(holder, body.peer_id, body.to, signature)

    def _take_signed(self, body: request_bodies.SignedMove) -> None:
        taker = self._taker(body.to)
        self._require_signed(body, taker.address)
        self._take(taker, body.peer_id)

    def _require_signed(
        self,
        body: request_bodies.SignedMove,
        address: str,
    ) -> bytes:
        """Return the signature. Raises Refused if the account at `address` did not make it."""
        held = self._binding(body.peer_id)
        signature = bytes.fromhex(body.signature.removeprefix("0x"))
        try:
            signer = EthAccount.recover_message(
                encode_defunct(self._message(body.peer_id, body.to, held.moves)),
                signature=signature,
            )
        except Exception as error:  # noqa: BLE001 - several libraries raise their own errors for untrusted bytes
            raise Refused(
                403, "SignatureWrong", f"not a signature ({type(error).__name__})"
            ) from None
        if signer != address:
            raise Refused(
                403,
                "SignatureWrong",
                f"signed by {signer}; expected the key of account {address}, over the contract's"
                f" message about move {held.moves}",
            )
        return signature

    # ----

    def _release(
        self,
        holder: Account,
        peer_id: str,
        to: str,
        signature: bytes | None,
    ) -> None:
        """Store the holder's consent; the service signs it if `signature` is None."""
        site = self._site
        require_active(holder)
        node = site.accounts.node(peer_id)
        if node is None or node.account_id != holder.id:
            raise node_unknown()
        taker = self._taker(to)
        if taker.id == holder.id:
            raise Refused(400, "SameAccount", f"the node belongs to {to} already")
        held = self._binding(peer_id)
        if held.account is not None:
            self._require_holder(held.account, holder, peer_id)
            if signature is None:
                signature = self._signature(holder, peer_id, taker, held.moves)
        releases.keep(site.accounts, peer_id, holder, taker, signature)
        log.info("node released peer_id=%s from=%s to=%s", peer_id, holder.address, taker.address)

    def _take(
        self,
        taker: Account,
        peer_id: str,
    ) -> None:
        """Move the node to the account that it was released to, on the chain and here.

        It can be repeated after a failure: the steps that were done are not undone.
        """
        site = self._site
        require_active(taker)
        release = self._release_to(taker, peer_id)
        holder = site.accounts.by_id(release.from_id)
        node = site.accounts.node(peer_id)
        if node is None or node.account_id != holder.id:
            raise Refused(409, "ReleaseOver", "the node is not the other account's any more")
        if problem := site.accounts.problem_of_new(taker):
            raise problem
        held = self._binding(peer_id)
        if held.account is not None and held.account != taker.address:
            self._require_holder(held.account, holder, peer_id)
            self._send(taker, release, self._signature_of(release, holder, taker, held.moves))
        site.accounts.move(peer_id, holder, taker)
        releases.forget(site.accounts, peer_id, taker)
        log.info("node moved peer_id=%s from=%s to=%s", peer_id, holder.address, taker.address)

    def _signature_of(
        self,
        release: Release,
        holder: Account,
        taker: Account,
        moves: int,
    ) -> bytes:
        """Return the holder's signature; the service signs for an account without a person."""
        if release.signature is not None:
            return release.signature
        if holder.is_nobodys:
            require_active(holder)
            return self._signature(holder, release.peer_id, taker, moves)
        raise Refused(
            409,
            "ReleaseOver",
            "the node was released before the chain knew it; ask for its release again",
        )

    def _signature(
        self,
        holder: Account,
        peer_id: str,
        taker: Account,
        moves: int,
    ) -> bytes:
        message = encode_defunct(self._message(peer_id, taker.address, moves))
        return bytes(self._site.accounts.key_of(holder).sign_message(message).signature)

    def _send(
        self,
        taker: Account,
        release: Release,
        signature: bytes,
    ) -> None:
        site = self._site
        proof = peer_proof.Proof(b"", signature, is_move=True)
        call = peer_proof.call(site.coordinator, release.peer_id, proof)
        site.queues.send(
            taker,
            call,
            lambda first: site.accounts.note_sent(taker, release.peer_id, call.name, first, None),
        )

    def _release_to(
        self,
        taker: Account,
        peer_id: str,
    ) -> Release:
        for release in releases.releases_to(self._site.accounts, taker):
            if release.peer_id == peer_id:
                return release
        raise Refused(
            404, "NotReleased", f"no account has released node {peer_id} to {taker.address}"
        )

    def _taker(self, address: str) -> Account:
        found = self._site.accounts.by_address(address)
        if found is None:
            raise Refused(
                404,
                "AccountUnknown",
                f"there is no account {address[:60]} here; its owner signs in, and finds the"
                " account's address at the foot of each page",
            )
        return found

    def _require_holder(
        self,
        address: str,
        holder: Account,
        peer_id: str,
    ) -> None:
        if address != holder.address:
            raise Refused(
                409,
                "PeerOfAnotherAccount",
                f"on the chain node {peer_id} belongs to {address}, not to {holder.address}; use a"
                " new key, or register it for this account first",
            )

    def _binding(self, peer_id: str) -> peer_proof.Binding:
        if not peer_proof.is_checked(self._site.coordinator):
            raise Refused(
                409,
                "MovesUnknown",
                "the contract of this chain can't move nodes; unlink it, and use a new key",
            )
        return peer_proof.binding(self._site.coordinator, peer_id)

    def _message(
        self,
        peer_id: str,
        to: str,
        moves: int,
    ) -> bytes:
        deployment = self._site.coordinator.deployment
        return peer_proof.message_of_move(peer_id, deployment, to, moves)
