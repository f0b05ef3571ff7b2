"""What strangers may send: any JSON, any text, any number, any address."""

import json
from urllib.parse import quote

from hypothesis import strategies as st

# Half surrogate pairs, ends of lines, what hides or turns text, markup, quotes, other scripts' digits.
_PIECES = (
    "\ud800", "\udfff", "\udc80", "\ud83d\ude00", "\u2028", "\u2029", "\x85", "\x00", "\r\n", "\x1b[31m",
    "\u202e", "\ufeff", "\ufffd", "<script>", "'\"", "{{7*7}}", "\u0661\u00b2", "%00", "../", "9" * 5000,
    "a" * 300, "NaN", "1e999", "-0", "(a+)+$", "\\",
)  # fmt: skip
TEXTS = st.lists(st.text(st.characters(), max_size=4) | st.sampled_from(_PIECES), max_size=3).map("".join)
_BIG = [sign * n for n in (2**31, 2**63, 2**64, 10**19, 10**400, 10**4299) for sign in (1, -1)]
NUMBERS = (
    st.integers(-3, 300)
    | st.sampled_from(_BIG)
    | st.floats()
    | st.sampled_from([1e-300, 5e-324, 1e39, 3.5e38, -0.0, 16.0, 2.0**70])
)


def _nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS | st.sampled_from([12, 17, 60, 400]).map(_nested),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(TEXTS, inside, max_size=3),
    max_leaves=6,
)
# As clients may write an address.
PATHS = st.one_of(
    TEXTS.map(lambda text: quote(text, errors="replace")),
    st.binary(max_size=8).map(quote),
    st.sampled_from(["9" * 5000, "1" * 18, "-1", "%ff%fe", "0/" + "9" * 4400, "?a=%ff", "//x/", "..%2f"]),
)


def written(value, how):
    """JSON of a value as most clients write it, and as some do: bytes."""
    whole = json.dumps(value)
    others = {
        6: json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass"),
        7: whole.encode("utf-16"),
        8: whole.replace("300", "9" * 5000).replace("1e+39", "1e400").encode(),
    }
    return others.get(how, whole.encode())


def read(text):
    """JSON by the letter: no NaN, no infinity."""

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)
