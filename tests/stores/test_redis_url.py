"""A URL of Redis says where and who; what is wrong with one is said without any part of it."""

from __future__ import annotations

import re
import traceback
from pathlib import Path

import pytest

from proteus_pipeline.errors import ConfigError
from proteus_pipeline.stores.redis_url import given_url, parse_url


def test_all_that_a_url_says(tmp_path: Path) -> None:
    authority = tmp_path / "ca.pem"
    authority.write_text("")
    place = parse_url(f"rediss://ada:p%40ss%2Fword@db.example.org:7000/3?ssl_ca_certs={authority}")
    assert (place.host, place.port, place.db, place.tls) == ("db.example.org", 7000, 3, True)
    assert (place.username, place.password) == ("ada", "p@ss/word")
    options = place.options()
    assert options["ssl_ca_certs"] == str(authority)
    assert options["ssl_cert_reqs"] == "required" and options["ssl_check_hostname"] is True


def test_a_place_is_shown_without_secrets() -> None:
    place = parse_url("redis://ada:hunter2@[::1]/0")
    assert str(place) == "redis://[::1]:6379/0"
    assert "hunter2" not in repr(place) and "ada" not in repr(place)


@pytest.mark.parametrize(
    "url",
    [
        "redis://ada:hun#ter2@db/0",
        "redis://ada:hun/ter2@db/0",
        "redis://ada:hun?ter2@db/0",
        "redis://ada:12?ssl_ter2=x@db/0",
        "redis://ada:hunter2@db:port/0",
        "redis://ada:hunter2@db:0/0",
        "redis://ada:hunter2@db:99999/0",
        "redis://ada:hunter2@/0",
        "redis://ada:hunter2@db/zero",
        "redis://ada:hunter2@db/0?socket_timeout=9000",
        "redis://ada:hunter2@db/0?password=hunter2",
        "rediss://ada:hunter2@db/0?ssl_cert_reqs=none",
        "rediss://ada:hunter2@db/0?ssl_ca_certs=/not/there",
        "http://ada:hunter2@db/0",
        "hunter2",
        "redis://ada:hunter2@[db/0",
        "redis://ada:hunter2@d b/0",
    ],
)
def test_a_bad_url_is_one_line_without_any_of_it(url: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_url(url)
    shown = "".join(traceback.format_exception(refused.value)) + repr(refused.value.__context__)
    message = str(refused.value)
    assert "\n" not in message and "; " in message
    # Not the source lines of this test, which format_exception never shows: only what the errors say.
    assert not re.search(r"hunter2|hun\b|ter2|ada\b", re.sub(r'File ".*', "", shown)), shown


def test_a_setting_goes_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert given_url(None) is None
    monkeypatch.setenv("PROTEUS_REDIS_URL", "redis://b")
    assert given_url("redis://a") == "redis://a"
    assert given_url(None) == "redis://b"
