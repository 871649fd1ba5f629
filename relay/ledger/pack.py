"""Documents small in the store: JSON, deflated against a dictionary of the words that ours are made of.

The first byte names the form, so that another dictionary can come later without breaking what is stored.
"""

import zlib
from typing import Any

import orjson

_WORDS_1 = (
    b'"user_id":null},"others":[],"revision":1,"custom":{},"participants":[],"transfers":[],"transcription":null,'
    b'"organization":null,"email":"external_id":"name":"lookup_status":"skipped""unavailable""none""matched","count":1,'
    b'"id":null,"contact":{"recording":{"status":"unsupported""unavailable""available""none""pending","url":null,'
    b'"expires_at":null,"content_type":"audio/wav","size_bytes":null,"duration_seconds":null,"sha256":null,"path":"'
    b'"derived":["ended_at"],"answered_at":null,"ended_at":null,"started_at":"20","extension":null,'
    b'"internal_number":"+1","external_number":"+1","type":"sip""anonymous""conference""emergency""short""unknown"'
    b'"extension","extension":"internal":true,"internal":false,"country":"US","type":"e164","raw":"(","number":"+1'
    b'"to":{"number":null,"raw":"from":{"ended_by":null,"end_reason":null,"status_raw":"NO ANSWER""BUSY""FAILED"'
    b'"ANSWERED","missed":true,"missed":false,"outcome":"cancelled""declined""abandoned""voicemail""failed""busy"'
    b'"no_answer""unknown""answered","direction":"internal""outbound""inbound","kind":"conference""call",'
    b'"provider_call_id":"{"id":"evt_","type":"call.transcript.completed""call.recording.failed""call.updated"'
    b'"call.recording.completed""call.completed","timestamp":"20","api_version":"2025-07-01","data":{"call":{'
    b'"id":"call_","provider":"webfones","provider_call_id":"","source_id":"main","changes":{'
    b'"context":{"via":"poll","observed_at":"20","timezone_assumed":"UTC"},"links":{"call":null,"recording":null}}'
)


def pack(document: Any) -> bytes:
    """Pack a JSON document (or the bytes of one)."""
    raw = document if isinstance(document, bytes) else orjson.dumps(document)
    deflate = zlib.compressobj(6, zlib.DEFLATED, -15, 9, zlib.Z_DEFAULT_STRATEGY, _WORDS_1)
    return b"\x01" + deflate.compress(raw) + deflate.flush()


def unpack_bytes(packed: bytes) -> bytes:
    """Give back the bytes of what `pack` packed."""
    if packed[:1] != b"\x01":
        raise ValueError(f"a stored document has the unknown form {packed[:1]!r}; was it written by a newer release?")
    return zlib.decompressobj(-15, _WORDS_1).decompress(packed[1:])


def unpack(packed: bytes) -> Any:
    """Give back what `pack` packed."""
    return orjson.loads(unpack_bytes(packed))
