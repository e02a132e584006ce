"""The login API's calls about the prediction market, and its reads through the account service."""

import requests
from account_service import account_settings, serving, some_identity

from tests.chain.hall import Hall
from worker.chain.coordinator import Coordinator
from worker.chain.market import TOKEN, Market
from worker.settings import chain_of_node


def test_node_bets_and_claims_through_the_account_service(hall: Hall, tmp_path) -> None:
    parsed = account_settings(hall.chain.settings, tmp_path / "account")
    place = parsed.market.model_copy(
        update={"contract": hall.market.address, "judge_url": "http://127.0.0.1:9"}
    )
    parsed = parsed.model_copy(update={"market": place})
    node = some_identity(tmp_path)
    with serving(parsed) as service:
        client = service.enrolled(node, tmp_path / "node")
        client.register_peer(node.peer_id)
        said = client.swarm()
        assert (said.market, said.judge_url) == (hall.market.address, "http://127.0.0.1:9")
        # Reads go through /rpc, which lets the market pass next to the coordinator.
        chain = chain_of_node(service.node_chain(), tmp_path / "node")
        market = Market(Coordinator(chain), said.market)
        assert market.version == hall.market.version
        game, salt = hall.open(1, 2, 0)
        client.guess_answer(market, game, node.peer_id, 0, 0, 30 * TOKEN)
        assert market.guess_of(game, node.peer_id, 0, 0).bet == 30 * TOKEN
        body = {"orgId": "hivewright", "peerId": node.peer_id}
        headers = {"Authorization": f"Bearer {client.token()}"}
        url = f"{service.url}/api/bet-token-balance"
        answer = requests.post(url, json=body, headers=headers, timeout=10).json()
        assert answer == {"result": str(70 * TOKEN)}
        # As JavaScript sends it, and once for a clue.
        guess = {**body, "gameId": game, "clueId": 0, "choiceIdx": 0, "bet": str(TOKEN)}
        url = f"{service.url}/api/guess-answer"
        answer = requests.post(url, json=guess, headers=headers, timeout=10)
        assert (answer.status_code, answer.json()["error"]) == (400, "AlreadyGuessed")
        hall.send("incrementRound", game)
        hall.send("revealAnswer", game, 0, salt)
        client.claim_reward(market, game, node.peer_id)
        assert market.balance(node.peer_id) == 100 * TOKEN
