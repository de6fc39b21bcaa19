"""Codes in words: what reasons and scores of rejected.parquet and selection.parquet mean. For the stages' pages."""

from __future__ import annotations

from http import HTTPStatus

FETCHING = {
    "timed_out": "no answer in time",
    "connection_failed": "the connection failed",
    "no_such_host": "there is no such host",
    "bad_certificate": "the certificate is not valid",
    "bad_answer": "the answer is no sound HTTP",
    "cut_short": "the data ends too early",
    "empty": "the answer is empty",
    "too_many_redirects": "redirected too often",
    "private_address": "the address is not a public one",
    "disallowed": "the site forbids it (robots.txt or X-Robots-Tag)",
    "robots_unavailable": "the site's robots.txt could not be had",
    "wrong_hash": "other bytes than the list's hash says",
    "os_error": "the system refused",
}
LIST = {
    "empty_url": "no URL",
    "not_http": "no http(s) URL",
    "malformed_url": "a URL that is none",
    "malformed_row": "a row that cannot be read",
    "bad_encoding": "text that is no valid Unicode",
    "no_caption": "no caption",
    "repeated_pair": "the same URL and caption once more",
}
PICTURES = {
    "unreadable": "no picture that can be decoded",
    "too_large": "larger than what is allowed",
    "too_narrow": "too narrow",
    "no_picture": "no picture",
    "damaged_tar": "the tar is damaged here",
    "lost_from_tar": "lost from the tar",
    "not_a_file": "no ordinary file in the tar",
    "unsafe_name": "a file name that leads out of the tar",
    "odd_name": "a file name that cannot be read",
    "embedding_not_finite": "the encoder gave numbers that are none",
}
FILTER = {
    "not_finite": "numbers that are none",
    "small_picture": "picture too small",
    "aspect_ratio": "picture too long or too wide",
    "caption_length": "caption too short or too long",
    "caption_pattern": "pattern in the caption",
    "url_pattern": "pattern in the URL",
    "other_language": "other language",
    "expression": "condition of the card",
    "low_aesthetic_score": "low aesthetic score",
    "high_safety_score": "high safety score",
    "low_clip_score": "low CLIP score",
    "off_target": "unlike the targets",
    "wrong_caption": "caption of another picture",
    "evaluation_overlap": "in an evaluation set",
    "repeated_caption": "caption of many pictures",
    "exact_copy": "exact copy",
    "near_copy": "near copy",
    "semantic_duplicate": "semantic duplicate",
}
# Scores of a row: name, and what it measures.
SCORES = {
    "clip_score": ("CLIP score", "cosine of picture and caption"),
    "aesthetic_score": ("Aesthetic score", "of the picture, by the card's head"),
    "safety_score": ("Safety score", "of the picture, by the card's head; the higher the less safe"),
    "wrong_probability": ("Caption of another picture", "probability, against captions dealt at random"),
}
WORDS = {**FETCHING, **LIST, **PICTURES, **FILTER}


def in_words(reason: str) -> str:
    """`http_404` → "HTTP 404, Not Found"; a code without words of its own, as a newer file may hold, reads as it is."""
    status = reason.removeprefix("http_")
    if status != reason and status.isdecimal():
        known = int(status) in HTTPStatus.__members__.values()
        return f"HTTP {status}, {HTTPStatus(int(status)).phrase}" if known else f"HTTP {status}"
    return WORDS.get(reason, reason.replace("_", " "))
