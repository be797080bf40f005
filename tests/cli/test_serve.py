"""`spar-d2 serve` and `web`: mistakes on the command line. tests/service has the service itself."""

import socket
import sys

import pytest

from spar_d2.cli.__main__ import main


def error(capsys, *options: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["serve", "--encoder", "ViT-B-16", "--pretrained", "", *options])
    output = capsys.readouterr()
    assert ended.value.code == 1 and output.out == ""
    return output.err


def test_missing_packages_are_named_with_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert 'pip install "spar_d2[web]"' in error(capsys)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--port", "65536"], "--port must be in 0..65535, got 65536"),
        (["--host", "no.such.host.invalid"], "--host no.such.host.invalid --port 8000 cannot be used"),
        (["--max-waiting", "0"], "max_waiting (--max-waiting) must be above 0, got 0"),
        (["--body-seconds", "-1"], "(--body-seconds) must be above 0"),
        (["--port", "0", "--vocabulary", "none.txt"], "there is no vocabulary file none.txt"),
        (["--port", "0", "--device", "gpu"], 'device must be "cpu", "cuda"'),
    ],
    ids=lambda value: value[-2] if isinstance(value, list) else "",
)
def test_mistakes_are_named(capsys, options, message):
    assert message in error(capsys, *options)


def test_a_port_in_use_is_named_before_the_model_is_loaded(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"--port {port} cannot be used" in error(capsys, "--port", port, "--pretrained", "none.safetensors")
