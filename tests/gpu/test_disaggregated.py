"""The whole system with both workers on one GPU: KV goes from one process's memory to the other's."""

from pathlib import Path

import pytest

from support.checkpoints import make_checkpoint
from support.system import running

PROMPT = list(range(3, 300))


@pytest.mark.parametrize(
    ("max_num_seqs", "backend", "transport"), [("1", "nixl", "nixl"), ("16", "auto", "cuda_ipc")]
)
def test_text_is_that_of_one_worker_and_every_byte_is_accounted_for(
    tmp_path: Path, max_num_seqs: str, backend: str, transport: str
) -> None:
    folder = make_checkpoint(tmp_path / "model", "qwen3", max_position_embeddings=1024)
    common = [str(folder), "--device", "cuda", "--dtype", "float32", "--attention-backend", "reference,cuda"]
    common += ["--kv-cache-memory-bytes", str(256 << 20), "--max-num-seqs", max_num_seqs]
    common += ["--transport-backend", backend]
    body = {"model": str(folder), "prompt": PROMPT, "max_tokens": 32, "temperature": 0, "ignore_eos": True}
    texts, records = [], []
    for pools in (["--unified", "1", "--prefill", "0", "--decode", "0"], ["--prefill", "1", "--decode", "1"]):
        with running(*common, *pools, log=tmp_path / "log") as system:
            answer = system.http.post("/v1/completions", json=body, timeout=60)
            assert answer.status_code == 200, answer.text
            texts.append(answer.json()["choices"][0]["text"])
            records.append(system.http.get(f"/disagg/requests/{answer.headers['x-request-id']}").json())
    assert texts[0] == texts[1]
    assert (records[0]["decision"], records[1]["decision"]) == ("local", "disaggregated")
    kv = records[1]["kv"]
    assert kv["pages"] == 19
    assert kv["bytes_received"] == kv["bytes_expected"] > 0
    assert kv["transport"] == transport
