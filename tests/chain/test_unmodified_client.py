"""The requests in docs/operations/join.md, sent by a client without hivewright."""

import pytest
import requests
from account_service import account_settings, eventually, serving
from eth_account import Account
from web3 import HTTPProvider, Web3
from web3.exceptions import Web3RPCError

from worker.chain.contract import coordinator_abi

PEER = "QmForeign"


@pytest.fixture
def urls(chain, tmp_path):
    with serving(account_settings(chain.settings, tmp_path / "account")) as service:
        base = service.url.replace("http://", f"http://peer:{service.token_of(PEER)}@")
        yield f"{base}/api", f"{base}/rpc"


def test_login_client_registers_reports_votes_and_reads_in_batches(chain, urls) -> None:
    api, rpc = urls
    body = {"orgId": "hivewright", "peerId": PEER}
    assert (
        requests.get(f"{api}/get-api-key-status", params={"orgId": "hivewright"}, timeout=20).text
        == "activated"
    )
    assert requests.post(f"{api}/register-peer", json=body, timeout=20).status_code == 200
    web3 = Web3(HTTPProvider(rpc))
    contract = web3.eth.contract(address=chain.deployment.contract, abi=coordinator_abi())
    eventually(lambda: contract.functions.getEoa([PEER]).call() != ["0x" + "00" * 20], 20)
    reward = {**body, "roundNumber": 0, "stageNumber": 0, "reward": 7}
    assert requests.post(f"{api}/submit-reward", json=reward, timeout=20).status_code == 200
    vote = {**body, "roundNumber": 0, "winners": ["QmYou"]}
    assert requests.post(f"{api}/submit-winner", json=vote, timeout=20).status_code == 200
    with web3.batch_requests() as batch:
        batch.add(contract.functions.currentRound())
        batch.add(contract.functions.currentStage())
        assert list(batch.execute()) == [0, 0]
    eventually(lambda: contract.functions.getTotalRewards([PEER]).call() == [7], 20)


def test_wallet_client_sends_itself_and_is_told_of_another_chain(chain, urls) -> None:
    web3 = Web3(HTTPProvider(urls[1]))
    contract = web3.eth.contract(address=chain.deployment.contract, abi=coordinator_abi())
    account = Account.create()
    fields = {"from": account.address, "nonce": 0, "gas": 500_000, "gasPrice": 0, "chainId": 31337}
    built = contract.functions.registerPeer("QmWallet").build_transaction(fields)
    with pytest.raises(Web3RPCError, match="signed for chain id 685685; this is chain 31337"):
        web3.eth.send_raw_transaction(
            account.sign_transaction({**built, "chainId": 685685}).raw_transaction
        )
    sent = web3.eth.send_raw_transaction(account.sign_transaction(built).raw_transaction)
    assert web3.eth.wait_for_transaction_receipt(sent, timeout=20, poll_latency=0.2)["status"] == 1
