"""Language families, by ISO 639-1 code: the groups whose mean scores are reported."""

# As in XTREME's table of languages (Hu et al. 2020, arXiv 2003.11080), with Indo-European by branch.
_MEMBERS = {
    "germanic": "af de en nl",
    "romance": "es fr it pt ro",
    "slavic": "bg pl ru uk",
    "baltic": "lt",
    "hellenic": "el",
    "indo_aryan": "bn gu hi mr pa ur",
    "iranian": "fa",
    "semitic": "ar he",
    "turkic": "az kk tr",
    "uralic": "et fi hu",
    "dravidian": "ml ta te",
    "austronesian": "id jv ms tl",
    "austroasiatic": "vi",
    "kra_dai": "th",
    "sino_tibetan": "my zh",
    "japonic": "ja",
    "koreanic": "ko",
    "kartvelian": "ka",
    "niger_congo": "sw wo yo",
    "quechuan": "qu",
    "basque": "eu",
}

FAMILIES: dict[str, str] = {code: family for family, codes in _MEMBERS.items() for code in codes.split()}
