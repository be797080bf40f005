import logging

import pytest

from spar_d2.utils.errors import make_logs_printable, printable, readable_errors

HOSTILE = "photo\x1b]0;title\x07\x1b[2J\u202egpj.\x9b31m\r\udcff.jpg"


def test_control_characters_are_printed_as_text():
    shown = printable(HOSTILE)
    assert shown == r"photo\x1b]0;title\x07\x1b[2J\u202egpj.\x9b31m\r\udcff.jpg"
    shown.encode()


def test_other_text_stays():
    text = "Bäume, 木, 🌳, 👩\u200d🌾,\tline 1\nline 2"
    assert printable(text) == text


def test_errors_and_logs(capsys, caplog):
    with pytest.raises(SystemExit), readable_errors():
        raise ValueError(HOSTILE)
    assert "\x1b" not in capsys.readouterr().err
    logger, written = logging.getLogger("spar_d2.a_test"), []
    handler = logging.Handler()
    handler.emit = lambda record: written.append(record.getMessage())
    logger.addHandler(handler)
    make_logs_printable(logger)
    make_logs_printable(logger)
    try:
        logger.warning("left out %s", HOSTILE)
    finally:
        logger.removeHandler(handler)
    assert written == [f"left out {printable(HOSTILE)}"]
    assert len(handler.filters) == 1
