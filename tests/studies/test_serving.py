"""What the study of serving makes and reads, without vLLM: a server of our own answers."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import skipit
from studies import serving


class Server(BaseHTTPRequestHandler):
    asked = 0

    def do_GET(self) -> None:
        counts = {"flops_dense": 100, "flops_routed": 50, "flops_executed": 75}
        lines = [f'skipit_{name}_total{{budget="0.5"}} {Server.asked * value}' for name, value in counts.items()]
        self._answer("\n".join(lines).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert body["vllm_xargs"] == {"skipit_budget": "0.5"}
        Server.asked += 1
        assert body["return_token_ids"]
        assert body["stream"]
        parts = [{"choices": [{"token_ids": ids}]} for ids in (None, [4], [2])]
        lines = [f"data: {json.dumps(part)}\n\n" for part in [*parts, {"choices": []}]]
        self._answer("".join([*lines, "data: [DONE]\n\n"]).encode())

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def address() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_row(address: str, tmp_path: Path) -> None:
    found = serving.row(address, tmp_path, 16, at_once=2, requests=4, tokens=2, budget="0.5")
    assert found["routed"] == 0.5
    assert found["executed"] == 0.75
    assert found["said"] == [[4, 2], [4, 2]]
    assert found["per_second"] > 0
    assert found["ttft_p50"] <= found["ttft_p99"]
    printed = serving.table([{"served": "gated 0.5", "same": "2 of 2", **found}])
    assert "| gated 0.5 | 2 |" in printed
    assert "| 50.0% | 75.0% | 2 of 2 |" in printed


def test_budgets_are_met(tmp_path: Path) -> None:
    side, said = serving.make("reference", [0.75, 0.5], tmp_path / "checkpoint", tokens=4)
    assert set(said) == {"dense", "0.75", "0.5"}
    assert all(len(texts) == serving.CHECKED for texts in said.values())
    model, processor = skipit.load(tmp_path / "checkpoint")
    for budget in (0.75, 0.5):
        prompt = serving.inputs_of(processor, 0, side)
        _, trace = skipit.generate(model, return_trace=True, budget=budget, **prompt, max_new_tokens=1)
        assert trace.share == pytest.approx(budget, abs=0.05)
