"""Names that are safe as tags and paths; versions by SemVer 2.0; references, exact and floating."""

from __future__ import annotations

import random
import subprocess
from itertools import pairwise

import pytest
from gto.constants import tag_re
from hypothesis import given
from hypothesis import strategies as st

from proteus_pipeline.errors import InvalidVersionError
from proteus_pipeline.identity.names import MAX_NAME, Reference, Version, check_name

GOOD = ("a", "7", "esm2_t33_650M_UR50D", "a-b_c", "lab/esm2", "a/b/c", "A" * MAX_NAME, "a--b", "x__y")
BAD = (
    "", " ", ".", "..", "../x", "a/../b", "a/..", "/a", "a/", "a//b", "a b", " a", "a ", "-a", "-rf", "--help", "a-",
    "_a", "a_", "a/-b", "a.b", "a.lock", "a@b", "a#b", "a:b", "a~1", "a^", "a?", "a*", "a[0]", "a\\b", "a\n", "\na",
    "a\nb", "a\0", "a\t", "$(id)", "`id`", "a;b", "a|b", "a&b", "a>b", "a'b", 'a"b', "a{b", "a!b", "é", "модель", "模型",
    "a\u200b", "\uff41", "a٣", "C:\\x", "~", "x" * 101, "x" * 300, "a/" * 150 + "a",
)  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_good_names(name: str):
    assert check_name(name) == name


@pytest.mark.parametrize("name", BAD)
def test_bad_names_are_refused_in_one_short_line(name: str):
    with pytest.raises(InvalidVersionError) as caught:
        check_name(name)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300
    assert caught.value.remedy
    assert caught.value.exit_code == 2


@given(st.from_regex(r"[A-Za-z0-9/_.@~^ -]{1,12}", fullmatch=True))
def test_a_name_that_passes_is_a_tag_that_git_and_gto_take(name: str):
    try:
        check_name(name)
    except InvalidVersionError:
        return
    assert tag_re.match(f"{name}@v1.0.0")["artifact"] == name
    parts = name.split("/")
    assert all(part and not part.startswith(("-", ".")) and not part.endswith((".", ".lock")) for part in parts)


def test_git_takes_tags_of_good_names():
    for name in GOOD:
        assert (
            subprocess.run(["git", "check-ref-format", f"refs/tags/{name}@v1.0.0-rc.1+b.2"], check=False).returncode
            == 0
        )


# https://semver.org, items 11.2 to 11.4.4, each list in rising order.
PRECEDENCE = (
    ("1.0.0", "2.0.0", "2.1.0", "2.1.1"),
    ("1.0.0-alpha", "1.0.0"),
    (
        "1.0.0-alpha",
        "1.0.0-alpha.1",
        "1.0.0-alpha.beta",
        "1.0.0-beta",
        "1.0.0-beta.2",
        "1.0.0-beta.11",
        "1.0.0-rc.1",
        "1.0.0",
    ),
    ("1.9.0", "1.10.0", "1.11.0"),
    ("1.0.0-1", "1.0.0-2", "1.0.0-10", "1.0.0-a"),
)


@pytest.mark.parametrize("rising", PRECEDENCE)
def test_precedence_is_semvers(rising: tuple[str, ...]):
    versions = [Version.parse(text) for text in rising]
    assert all(a < b and b > a and a != b and a <= b for a, b in pairwise(versions))
    shuffled = random.Random(0).sample(versions, len(versions))
    assert sorted(shuffled) == versions


def test_build_metadata_orders_where_precedence_is_equal():
    plain, one, two = (Version.parse(text) for text in ("1.0.0", "1.0.0+1", "1.0.0+2"))
    assert plain < one < two < Version.parse("1.0.1-a")
    assert one != two


@pytest.mark.parametrize(
    "text", ["0.0.0", "1.2.3", "1.2.3-rc.1", "1.2.3-0a.x-y.7+build.001", "1.0.0+20260101", "99999.0.1"]
)
def test_good_versions_with_and_without_v(text: str):
    assert Version.parse(text) == Version.parse(f"v{text}")
    assert str(Version.parse(f"v{text}")) == text


@pytest.mark.parametrize(
    ("text", "nearest"),
    [
        ("1", "1.0.0"),
        ("v2", "2.0.0"),
        ("1.2", "1.2.0"),
        ("1.2-rc.1", "1.2.0-rc.1"),
        ("v1.2.3.4", "1.2.3"),
        ("01.2.3", "1.2.3"),
        ("1.02.3", "1.2.3"),
        ("1.2.3-", "1.2.3"),
        ("1.2.3-rc.01", "1.2.3"),
        ("1.2.3+", "1.2.3"),
        ("1.2.3-a b", "1.2.3"),
        ("1.2.3\n", "1.2.3"),
        (" 1.2.3", "1.2.3"),
        ("vv1.2.3", "1.2.3"),
        ("", "1.0.0"),
        ("newest", "1.0.0"),
        ("-1.0.0", "1.0.0"),
        ("1.2.٣", "1.2.0"),
        ("1.2.1٣", "1.2.1"),
        ("1.2.3-é", "1.2.3"),
        ("9" * 300, "999999999.0.0"),
        ("1.2.3-" + "a" * 300, "1.2.3-" + "a" * 39),
    ],
)
def test_bad_versions_are_refused_with_the_nearest_good_one(text: str, nearest: str):
    with pytest.raises(InvalidVersionError) as caught:
        Version.parse(text)
    assert caught.value.remedy == f"the nearest is {nearest}"
    assert Version.parse(nearest).text == nearest
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@given(st.text(max_size=30) | st.from_regex(r"v?[0-9٣.x+-]{0,12}\n?", fullmatch=True))
def test_any_text_is_a_version_or_an_error_that_names_a_version(text: str):
    try:
        assert Version.parse(text).text.isascii()
    except InvalidVersionError as error:
        Version.parse(error.remedy.removeprefix("the nearest is "))


@pytest.mark.parametrize(
    ("text", "name", "selector", "exact"),
    [
        ("esm2", "esm2", "current", False),
        ("esm2@current", "esm2", "current", False),
        ("esm2@latest", "esm2", "latest", False),
        ("esm2@1.x", "esm2", "1.x", False),
        ("esm2@0.12.x", "esm2", "0.12.x", False),
        ("lab/esm2@v1.2.3", "lab/esm2", "1.2.3", True),
        ("esm2@1.2.3-rc.1+b", "esm2", "1.2.3-rc.1+b", True),
    ],
)
def test_references(text: str, name: str, selector: str, exact: bool):
    reference = Reference.parse(text)
    assert (reference.name, reference.selector, reference.exact) == (name, selector, exact)
    assert Reference.parse(str(reference)) == reference
    assert str(reference) == f"{name}@{'v' if exact else ''}{selector}"


@pytest.mark.parametrize(
    "text",
    ["", "@1.0.0", "esm2@", "esm2@1", "esm2@1.2", "esm2@x", "esm2@1.x.x", "esm2@1.x.2", "esm2@01.x", "esm2@1.X",
     "esm2@v1.x", "esm2@^1.0.0", "esm2@~1.0", "esm2@>=1", "esm2@*", "esm2@Latest", "esm2@latest\n", "esm2@1.x\n",
     "esm2@1.0.0@1.0.0", "esm2#prod", "esm2@v1.0.0!", "../x@1.0.0", "esm2 @1.0.0", "esm2@ 1.0.0", "esm2@1٢.x"],
)  # fmt: skip
def test_bad_references_are_refused(text: str):
    with pytest.raises(InvalidVersionError) as caught:
        Reference.parse(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [None, 1, 1.1, ["esm2"]])
def test_a_reference_that_yaml_made_a_number_is_refused(value: object):
    with pytest.raises(InvalidVersionError, match="in quotes"):
        Reference.parse(value)


def test_what_a_reference_selects():
    versions = [Version.parse(v) for v in ("0.9.0", "1.0.0", "1.2.0", "1.2.9", "1.20.0", "1.3.0-rc.1", "10.0.0")]
    chosen = {
        text: [v.text for v in versions if Reference.parse(f"m{text}").selects(v)]
        for text in ("@1.x", "@1.2.x", "@0.x", "@2.x", "@latest", "@1.2.0", "@1.3.0-rc.1", "@1.2.1")
    }
    assert chosen == {
        "@1.x": ["1.0.0", "1.2.0", "1.2.9", "1.20.0"],
        "@1.2.x": ["1.2.0", "1.2.9"],
        "@0.x": ["0.9.0"],
        "@2.x": [],
        "@latest": ["0.9.0", "1.0.0", "1.2.0", "1.2.9", "1.20.0", "10.0.0"],
        "@1.2.0": ["1.2.0"],
        "@1.3.0-rc.1": ["1.3.0-rc.1"],
        "@1.2.1": [],
    }
