"""How text is cut into words before byte-pair merges: the pre-tokenizers that GGUF files name.

The names and expressions are facts of the tokenizers' own `tokenizer.json` files and of llama.cpp's list of names
(`tokenizer.ggml.pre`). The expressions of a pre-tokenizer are applied one after another, each to the pieces that the
one before it left; matches and the gaps between them become pieces. Their syntax is Oniguruma's for Ruby, as in the
`tokenizers` library.

Where an expression would look ahead to the end of a run from each of its characters, which takes quadratic time on
hostile text, it is written here as two that find the same cuts in linear time.
"""

from __future__ import annotations

from dataclasses import dataclass

from mnemos.errors import UnsupportedError


@dataclass(frozen=True)
class PreTokenizer:
    """One way to cut text into words.

    ignore_merges: a word that is a token as a whole is taken as it is, whatever the merges say.
    add_bos: text starts with the bos token unless the file says otherwise.
    byte_level: tokens spell bytes in GPT-2's alphabet; otherwise they are plain text with U+2581 for a space, and bytes
    without a token of their own are written as <0xXX>.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False
    byte_level: bool = True


_CONTRACTION = r"'(?:[sStTmMdD]|[rR][eE]|[vV][eE]|[lL][lL])"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LEAD = r"[^\r\n\p{L}\p{N}]?"
_SPACES = r"\s+(?!\S)|\s+"
_ASCII_PUNCTUATION = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"
_CJK = r"[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"


def _words(numbers: str = r"\p{N}{1,3}", newlines: str = r"\s*[\r\n]+", spaces: str = _SPACES) -> str:
    """The family that began with cl100k: contractions, letters after one mark, numbers, marks, line ends, spaces."""
    return rf"{_CONTRACTION}|{_LEAD}\p{{L}}+|{numbers}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{newlines}|{spaces}"


def _cased_words(numbers: str, contraction: str) -> str:
    """The family that began with o200k: words also end where lower case turns to upper case."""
    return (
        rf"{_LEAD}{_UPPER}*{_LOWER}+{contraction}|{_LEAD}{_UPPER}+{_LOWER}*{contraction}|{numbers}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|{_SPACES}"
    )


def _punctuated_words(tail: str, newlines: str) -> str:
    """The family that began with DeepSeek-V3."""
    return (
        rf"{_ASCII_PUNCTUATION}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+"
        rf"| ?[\p{{P}}\p{{S}}]+{tail}|{newlines}|{_SPACES}"
    )


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CL100K = _words()
_QWEN2 = _words(numbers=r"\p{N}")
_GPT4O = _cased_words(r"\p{N}{1,3}", f"(?:{_CONTRACTION})?")
_BLOOM = r" ?[^(\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
_LINES = r"[^\n]+|\n+"
# Digits in groups of three counted from the right: the one or two that are left over come off the front first.
_LEFT_OVER_DIGITS = r"(?<!\d)\d{1,2}(?=(?:\d{3})++(?!\d))"
# Letters that have case, as DeepSeek's tokenizer lists them.
_DEEPSEEK_LETTERS = (
    r"A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376\u0377"
    r"\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556"
    r"\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a"
    r"\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4"
    r"\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc"
    r"\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f"
    r"\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b"
    r"\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a"
    r"\x{10400}-\x{1044f}\x{104b0}-\x{104d3}\x{104d8}-\x{104fb}\x{10c80}-\x{10cb2}\x{10cc0}-\x{10cf2}"
    r"\x{118a0}-\x{118df}\x{1e900}-\x{1e943}"
)
_EAST_ASIAN = (
    r"[\u4e00-\u9fff\u3400-\u4dbf\u8c48-\ufaff\u3040-\u309f\u30a0-\u30ff\uff65-\uff9f\u2f00-\u2fdf\u0e40-\u0e7f"
    r"\u0e80-\u0eff\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff\uac00-\ud7af\u1100-\u11ff]+"
)

_GPT2_STYLE = PreTokenizer((_GPT2,))
_DIGITS_FIRST = PreTokenizer((r"\p{N}", _GPT2))
_LLAMA3_STYLE = PreTokenizer((_CL100K,), ignore_merges=True, add_bos=True)
_CL100K_STYLE = PreTokenizer((_CL100K,))
_QWEN2_STYLE = PreTokenizer((_QWEN2,))
_GPT4O_STYLE = PreTokenizer((_GPT4O,))
_DEEPSEEK3_STYLE = PreTokenizer((r"\p{N}{1,3}", _CJK, _punctuated_words(r"[\r\n]*", r"\s*[\r\n]+")))
_BLOOM_STYLE = PreTokenizer((_BLOOM,))
_GEMMA4_STYLE = PreTokenizer((_LINES,), add_bos=True, byte_level=False)
_TINY_AYA_STYLE = PreTokenizer((r"(?<!\d)\d++\b", r"\A\d{1,2}(?=(?:\d{3})++\z)", _GPT4O))
_BAILING_STYLE = PreTokenizer((_words(numbers=r"\p{N}", newlines=r"\s*[\r\n]"),))

_STYLES: dict[PreTokenizer, tuple[str, ...]] = {
    # Files from before the key existed.
    PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")): ("default",),
    _LLAMA3_STYLE: (
        "llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano",
    ),
    _CL100K_STYLE: ("dbrx", "smaug-bpe", "chatglm-bpe", "glm4"),
    PreTokenizer((r"\p{N}{1,3}", _words(numbers=r"\p{N}+")), ignore_merges=True): ("minicpm5",),
    PreTokenizer(
        (
            _words(
                spaces="|".join(rf"\s{{{n}}}(?!\S)" for n in (512, 256, 128, 64, 32, 16, 8, 4)) + r"|\s{1,2}(?!\S)|\s"
            ),
        )
    ): ("jais-2",),
    PreTokenizer(
        (
            r"[\r\n]",
            rf"\s?[{_DEEPSEEK_LETTERS}]+",
            r"\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
            r"(?<!\s)\s++\z",
            r"[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
            r"\p{N}+",
        )
    ): ("deepseek-llm",),
    PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+", r"\p{N}")): (
        "deepseek-coder",
    ),
    _DEEPSEEK3_STYLE: ("deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"),
    PreTokenizer((r"\p{N}{1,3}", _CJK, _punctuated_words("", r"[\r\n]"), r"\p{N}")): ("spark2_5",),
    PreTokenizer(
        (
            r"[\uac00-\ud7a3\u3131-\u318e]+"
            r"|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f\ufe30-\ufe4f]+"
            r"|[\u3105-\u312f]+|[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
            _cased_words(r"\p{N}", f"(?:{_CONTRACTION})?"),
        ),
        ignore_merges=True,
    ): ("youtu",),
    PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]")): ("falcon",),
    _DIGITS_FIRST: ("starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b", "mellum2"),
    _GPT2_STYLE: (
        "gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "gigachat", "a.x-4.0", "mellum",
        "modern-bert", "exaone4", "jina-es", "jina-de", "jina-v2-es", "jina-v2-de", "jina-v1-en", "jina-v2-code",
        "roberta-bpe",
    ),
    _QWEN2_STYLE: (
        "qwen2", "stablelm2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "hunyuan", "solar-open", "grok-2",
    ),
    PreTokenizer(
        (
            rf"{_CONTRACTION}|{_LEAD}[\p{{L}}\p{{M}}]+|\p{{N}}"
            rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|{_SPACES}",
        )
    ): ("qwen35",),
    _BLOOM_STYLE: ("poro-chat", "bloom", "gpt3-finnish"),
    PreTokenizer((_BLOOM, r"\p{N}")): ("viking",),
    PreTokenizer((_cased_words(r"\p{N}", ""),), ignore_merges=True, add_bos=True): ("tekken",),
    PreTokenizer(
        (
            r"<sentinel:[0-9]+>",
            r"IMGIMG[A-I]{1,4}Z",
            r"[\t\n]|    |  ",
            r"\p{N}",
            r"[\p{P}!-/:-@\[-`{-~]",
            _GPT2,
        ),
        add_bos=True,
    ): ("chameleon",),
    _GPT4O_STYLE: ("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"),
    PreTokenizer((_GPT4O,), ignore_merges=True): ("granite-embed-multi-97m",),
    _TINY_AYA_STYLE: ("tiny_aya", "cohere2moe"),
    PreTokenizer(
        (
            r"\p{Han}+"
            rf"|{_LEAD}[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}&&[^\p{{Han}}]]*[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}&&[^\p{{Han}}]]+"
            rf"(?:{_CONTRACTION})?"
            rf"|{_LEAD}[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}&&[^\p{{Han}}]]+[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}&&[^\p{{Han}}]]*"
            rf"(?:{_CONTRACTION})?"
            rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|{_SPACES}",
        )
    ): ("kimi-k2",),
    PreTokenizer((r"\p{N}+", _LEFT_OVER_DIGITS, r"\d{3}")): ("superbpe",),
    _BAILING_STYLE: ("bailingmoe", "bailingmoe2", "llada-moe"),
    PreTokenizer(
        (rf"{_CONTRACTION}|{_LEAD}\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|\s*[\r\n]+|{_SPACES}",)
    ): ("seed-coder",),
    PreTokenizer((rf"{_LEAD}\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|{_SPACES}",)): ("ufakzeka",),
    PreTokenizer(
        (
            r"\p{N}+",
            r"\A\p{N}{1,2}(?=(?:\p{N}{3})++\z)",
            r"\p{N}{3}",
            _EAST_ASIAN,
            _punctuated_words(r"[\r\n]*", r"\s*[\r\n]+"),
        )
    ): ("afmoe",),
    PreTokenizer((_LINES, _QWEN2)): ("laguna",),
    PreTokenizer(
        (
            rf"{_CONTRACTION}|{_LEAD}(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
            rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]?|\s*[\r\n]|{_SPACES}",
        )
    ): ("exaone-moe",),
    _GEMMA4_STYLE: ("gemma4", "granite-embed-multi-311m"),
    PreTokenizer((_LINES,), byte_level=False): ("sarvam-moe",),
}  # fmt: skip

PRE_TOKENIZERS = {name: style for style, names in _STYLES.items() for name in names}


def find_pre_tokenizer(name: str, label: str) -> PreTokenizer:
    """The pre-tokenizer of that name; `label` is the file, for the error."""
    try:
        return PRE_TOKENIZERS[name]
    except KeyError:
        supported = ", ".join(sorted(PRE_TOKENIZERS))
        raise UnsupportedError(f"{label}: tokenizer.ggml.pre is {name[:80]!r}; supported are {supported}") from None
