"""Compression of JSON documents: deflated against a preset dictionary of typical ones, which makes small ones small.

The first byte names the format, so that a later release can use another dictionary and still read what is stored.
"""

import zlib
from typing import Any

import orjson

_DICTIONARY_1 = (
    # Whole documents rather than words, so that a document becomes a few long matches. Deflate prefers what comes last.
    b'"status":"unsupported""unavailable""none""pending""lookup_status":"skipped""none""type":"sip""anonymous""confer'
    b'ence""emergency""short""unknown""outcome":"cancelled""declined""abandoned""voicemail""direction":"internal""unk'
    b'nown""kind":"conference""via":"backfill""stream""call.transcript.completed""call.recording.failed""call.updated'
    b'""changes":{"provider":"unpod""cinnox""nfon""derived":["ended_at"],"NO ANSWER""BUSY""FAILED""CANCELLED"{"provid'
    b'er_call_id":","kind":"call","direction":"outbound","outcome":"no_answer","missed":false,"status_raw":"NO ANSWER'
    b'","end_reason":null,"ended_by":null,"from":{"number":"+1,"raw":"(, x,"type":"e164","extension":","name":null,"c'
    b'ountry":"US","internal":true,"user_id":null},"to":{"number":"+1,"raw":"(","type":"e164","extension":null,"name"'
    b':","country":"US","internal":false,"user_id":null},"external_number":"+1,"internal_number":"+1,"extension":","s'
    b'tarted_at":"20","answered_at":null,"ended_at":null,"duration_seconds":null,"derived":[],"transcription":null,"t'
    b'ransfers":[],"participants":[],"custom":{}}{"lookup_status":"matched","count":1,"id":","external_id":","name":"'
    b',"organization":","email":","others":[],"number":"+1{"revision":1,"audio":"completed","transcript":false}{"stat'
    b'us":"available","url":null,"expires_at":null,"content_type":"audio/wav","size_bytes":1,"duration_seconds":1.0,"'
    b'sha256":","path":"20/call_.wav"}{"id":"evt_","type":"call.recording.completed","timestamp":"20","api_version":"'
    b'2026-11-01","data":{"call":{"id":"call_{"id":"evt_","type":"call.completed","timestamp":"20","api_version":"202'
    b'6-11-01","data":{"call":{"id":"call_","provider":"webfones","provider_call_id":","source_id":"main","kind":"cal'
    b'l","revision":1,"direction":"inbound","outcome":"answered","missed":false,"status_raw":"ANSWERED","end_reason":'
    b'null,"ended_by":null,"from":{"number":"+1,"raw":"(","type":"e164","extension":null,"name":","country":"US","int'
    b'ernal":false,"user_id":null},"to":{"number":"+1,"raw":"(, x,"type":"e164","extension":","name":null,"country":"'
    b'US","internal":true,"user_id":null},"external_number":"+1,"internal_number":"+1,"extension":","started_at":"20"'
    b',"answered_at":null,"ended_at":null,"duration_seconds":null,"derived":[],"recording":{"status":"available","url'
    b'":null,"expires_at":null,"content_type":"audio/wav","size_bytes":1,"duration_seconds":null,"sha256":"},"contact'
    b'":{"lookup_status":"none","count":0,"id":null,"external_id":null,"name":null,"organization":null,"email":null,"'
    b'others":[]},"transcription":null,"transfers":[],"participants":[],"custom":{}}},"context":{"via":"poll","observ'
    b'ed_at":"20","timezone_assumed":"UTC"},"links":{"call":"https://api./v1/calls/call_","recording":"https://api./v'
    b'1/calls/call_/recording"}}'
)


def pack(document: Any) -> bytes:
    raw = document if isinstance(document, bytes) else orjson.dumps(document)
    deflate = zlib.compressobj(6, zlib.DEFLATED, -15, 9, zlib.Z_DEFAULT_STRATEGY, _DICTIONARY_1)
    return b"\x01" + deflate.compress(raw) + deflate.flush()


def unpack_bytes(packed: bytes) -> bytes:
    if packed[:1] != b"\x01":
        raise ValueError(f"a stored document has the unknown format {packed[:1]!r}; was it written by a newer release?")
    return zlib.decompressobj(-15, _DICTIONARY_1).decompress(packed[1:])


def unpack(packed: bytes) -> Any:
    return orjson.loads(unpack_bytes(packed))
