"""`disagg chat` and `disagg bench serve` against the real HTTP server over a fake generator."""

import json
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner

from disagg.cli.bench_serve import bench_serve
from disagg.cli.chat import chat
from disagg.cli.drain import drain
from disagg.errors import Overloaded
from disagg.frontend import App, GenerateRequest, TextModel, create_app
from disagg.security import ApiKeys
from support.checkpoints import write_tokenizer
from support.generator import FakeGenerator
from support.http_server import RunningServer, serving

NUM_PROMPTS = 30


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> TextModel:
    folder = tmp_path_factory.mktemp("model")
    write_tokenizer(folder)
    return TextModel.from_folder(folder)


@pytest.fixture
def running(text: TextModel) -> Iterator[RunningServer]:
    def make_app(generator: FakeGenerator) -> App:
        generator.context = 4096
        return create_app(
            generator,
            TextModel(text.tokenizer, text.template),
            "m",
            api_keys=ApiKeys(("secret",)),
            retire_s=0.05,
        )

    with serving(make_app) as running:
        yield running


@pytest.fixture
def runner() -> CliRunner:
    return CliRunner(env={"DISAGG_API_KEY": "secret"})


def full_length(request: GenerateRequest, index: int) -> list[list[int]]:
    return [[40]] * request.sampling.max_tokens


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
@pytest.mark.parametrize("pace", [["--request-rate", "200"], ["--max-concurrency", "3"]])
def test_bench_measures_every_request(
    running: RunningServer, runner: CliRunner, tmp_path: Path, endpoint: str, pace: list[str]
) -> None:
    running.generator.reply = full_length
    path = tmp_path / "figures.json"
    flags = ["--num-prompts", str(NUM_PROMPTS), "--input-len", "20", "--output-len", "8", "--save-detailed"]
    result = runner.invoke(
        bench_serve,
        [running.base, "--endpoint", endpoint, "--output-json", str(path), "--ignore-eos", *flags, *pace],
    )
    assert result.exit_code == 0, result.output
    assert f"{NUM_PROMPTS} / 0" in result.stderr
    figures = json.loads(path.read_text())
    tickets = running.generator.tickets[1:]  # without the warm-up
    assert figures["completed"] == NUM_PROMPTS == len(tickets)
    assert figures["total_output_tokens"] == 8 * NUM_PROMPTS
    assert figures["total_input_tokens"] == sum(len(ticket.request.prompts[0]) for ticket in tickets)
    assert figures["output_lens"] == [8] * NUM_PROMPTS
    assert 0 < figures["median_ttft_ms"] <= figures["p99_ttft_ms"]
    assert all(ticket.request.sampling.ignore_eos for ticket in tickets)
    if pace[0] == "--max-concurrency":
        assert figures["max_concurrent_requests"] <= 3
    else:
        assert figures["duration"] >= (NUM_PROMPTS - 1) / 200 * 0.99


def test_bench_counts_failures_and_goes_on(running: RunningServer, runner: CliRunner) -> None:
    seen = 0

    def reply(request: GenerateRequest, index: int) -> list[list[int]]:
        nonlocal seen
        seen += 1
        running.generator.refusal = Overloaded("the queue is full", 1.0) if seen == 6 else None
        return [[40], [40]]

    running.generator.reply = reply
    result = runner.invoke(
        bench_serve, [running.base, "--num-prompts", "10", "--max-concurrency", "1", "--output-json", "-"]
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["failed"] == 5
    assert "5 failed: the queue is full" in result.stderr


def test_bench_ends_when_the_warm_up_fails(running: RunningServer, runner: CliRunner) -> None:
    result = runner.invoke(bench_serve, [running.base, "--input-len", "9000"])
    assert result.exit_code == 1
    assert "context" in result.stderr
    assert running.generator.tickets == []


def test_bench_says_what_is_wrong_with_its_flags(running: RunningServer, runner: CliRunner) -> None:
    for flags, word in (
        (["--goodput", "ttft"], "ttft, tpot"),
        (["--metric-percentiles", "50,x"], "list of numbers"),
        (["--extra-body", "[]"], "JSON object"),
        (["--api-key", "wrong"], "valid API key"),
        (["--request-rate", "0"], "request-rate"),
    ):
        result = runner.invoke(bench_serve, [running.base, *flags])
        assert result.exit_code in (1, 2)
        assert word in result.stderr


def test_help_fits_80_columns(runner: CliRunner) -> None:
    for command in (bench_serve, chat):
        output = runner.invoke(command, ["--help"], terminal_width=80).output
        assert max(map(len, output.splitlines())) <= 80


def test_chat_answers_piped_lines(running: RunningServer, text: TextModel, runner: CliRunner) -> None:
    running.generator.reply = lambda request, index: [text.tokenizer.encode("the fox", False), [2]]
    result = runner.invoke(
        chat, [f"{running.base}/v1", "--max-tokens", "5", "--seed", "7"], input="hi\nand?\n"
    )
    assert result.exit_code == 0, result.output
    assert result.stdout == "the fox\nthe fox\n"
    first, second = (ticket.request for ticket in running.generator.tickets)
    assert first.sampling.max_tokens == 5
    assert first.sampling.seed == 7
    prompt = text.tokenizer._tokenizer.decode(second.prompts[0], skip_special_tokens=False)
    assert "the fox<|im_end|>\n<|im_start|>user\nand?<|im_end|>" in prompt


def test_chat_without_a_server_says_how_to_start_one(runner: CliRunner) -> None:
    result = runner.invoke(chat, ["http://127.0.0.1:9"])
    assert result.exit_code == 1
    assert "disagg serve" in result.stderr


def test_drain_returns_when_the_server_has_retired(running: RunningServer, runner: CliRunner) -> None:
    result = runner.invoke(drain, [running.base])
    assert (result.exit_code, json.loads(result.stdout)) == (0, {"status": "retired"})
    assert httpx.get(f"{running.base}/health").status_code == 503


@pytest.mark.parametrize(
    ("url", "words"), [("http://127.0.0.1:9", "no answer"), ("nonsense", "no answer"), ("/v0", "404")]
)
def test_drain_says_what_went_wrong(running: RunningServer, runner: CliRunner, url: str, words: str) -> None:
    result = runner.invoke(drain, [running.base + url if url.startswith("/") else url])
    assert result.exit_code == 1
    assert words in result.stderr


def read_until(terminal: int, marker: str) -> str:
    shown = ""
    while marker not in shown:
        shown += os.read(terminal, 4096).decode()
    return shown


def test_ctrl_c_in_a_terminal_stops_the_answer_at_the_server(running: RunningServer) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "disagg", "chat", running.base, "--api-key", "secret"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=_take_terminal,
        env={**os.environ, "TERM": "dumb"},
    )
    os.close(theirs)
    try:
        read_until(ours, "> ")
        os.write(ours, b"Tell a story.\n")
        ticket = running.ticket()
        running.call(lambda: ticket.push(40))
        read_until(ours, "story.\r\n")
        os.write(ours, b"\x03")
        shown = read_until(ours, "> ")
        assert "(stopped)" in shown
        assert "Traceback" not in shown
        running.wait_for(ticket.left)
        assert ticket.aborted
        os.write(ours, b"\x04")
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def _take_terminal() -> None:
    """Make the terminal the session's own, and have Ctrl-C in it heard, as a shell does."""
    import fcntl
    import signal
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
