"""Documents small in the store: JSON, deflated against a dictionary of documents like ours.

The first byte names the form, so that another dictionary can come later without breaking what is stored.
"""

import zlib
from typing import Any

import orjson

_WORDS_1 = (
    # Whole documents rather than words: a document then is a few long matches. What is likely comes last.
    b'"status":"unsupported""unavailable""none""pending""lookup_status":"skipped""none""type":"sip""anonymous""confe'
    b'rence""emergency""short""unknown""outcome":"cancelled""declined""abandoned""voicemail""direction":"internal""u'
    b'nknown""kind":"conference""via":"backfill""stream""call.transcript.completed""call.recording.failed""call.upda'
    b'ted""changes":{"provider":"unpod""cinnox""nfon""derived":["ended_at"],"NO ANSWER""BUSY""FAILED""CANCELLED"{"pr'
    b'ovider_call_id":","kind":"call","direction":"outbound","outcome":"no_answer","missed":false,"status_raw":"NO A'
    b'NSWER","end_reason":null,"ended_by":null,"from":{"number":"+1,"raw":"(, x,"type":"e164","extension":","name":n'
    b'ull,"country":"US","internal":true,"user_id":null},"to":{"number":"+1,"raw":"(","type":"e164","extension":null'
    b',"name":","country":"US","internal":false,"user_id":null},"external_number":"+1,"internal_number":"+1,"extensi'
    b'on":","started_at":"20","answered_at":null,"ended_at":null,"duration_seconds":null,"derived":[],"transcription'
    b'":null,"transfers":[],"participants":[],"custom":{}}{"content":{"provider_call_id":","kind":"call","direction"'
    b':"outbound","outcome":"answered","missed":false,"status_raw":"ANSWERED","end_reason":null,"ended_by":null,"fro'
    b'm":{"number":"+1,"raw":"(, x,"type":"e164","extension":","name":null,"country":"US","internal":true,"user_id":'
    b'null},"to":{"number":"+1,"raw":"(","type":"e164","extension":null,"name":","country":"US","internal":false,"us'
    b'er_id":null},"external_number":"+1,"internal_number":"+1,"extension":","started_at":"20","answered_at":null,"e'
    b'nded_at":null,"duration_seconds":null,"derived":[],"transcription":null,"transfers":[],"participants":[],"cust'
    b'om":{},"contact":{"lookup_status":"matched","count":1,"id":","external_id":","name":","organization":","email"'
    b':","others":[]}},"revision":1,"audio":"completed","transcript":false}{"id":","type":"call.completed","timestam'
    b'p":"20","api_version":"2026-11-01","data":{"call":{"id":","provider":"webfones","provider_call_id":","source_i'
    b'd":"main","kind":"call","revision":1,"direction":"inbound","outcome":"answered","missed":false,"status_raw":"A'
    b'NSWERED","end_reason":null,"ended_by":null,"from":{"number":"+1,"raw":"(","type":"e164","extension":null,"name'
    b'":","country":"US","internal":false,"user_id":null},"to":{"number":"+1,"raw":"(, x,"type":"e164","extension":"'
    b',"name":null,"country":"US","internal":true,"user_id":null},"external_number":"+1,"internal_number":"+1,"exten'
    b'sion":","started_at":"20","answered_at":null,"ended_at":null,"duration_seconds":null,"derived":[],"recording":'
    b'{"status":"available","url":null,"expires_at":null,"content_type":"audio/wav","size_bytes":1,"duration_seconds'
    b'":null,"sha256":"},"contact":{"lookup_status":"none","count":0,"id":null,"external_id":null,"name":null,"organ'
    b'ization":null,"email":null,"others":[]},"transcription":null,"transfers":[],"participants":[],"custom":{}}},"c'
    b'ontext":{"via":"poll","observed_at":"20","timezone_assumed":"UTC"},"links":{"call":"https://api./v1/calls/call'
    b'_","recording":"https://api./v1/calls/call_/recording"}}'
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
