-- The hooks of the lanes whose items are calls, enrich and record (see exchange.lua).
--
-- ARGV   [1] the lane
--        [5] of record: the recording part of a call whose audio is not fetched any more, packed
-- FIELDS of record: recording  the call's recording, final: written to the call, which is due in enrich
--                   fetch      how far the attempts to fetch it have come
--
-- Races closed here:
-- * a call is erased while its recording is fetched: what arrives is not written.
-- * a recording arrives while the call is enriched: the enrich lease remembers it (see put), so it is published.
-- * a source is removed while its calls wait: the lane drops them; they are owed still, should it be added again.

local ENRICH_AGAIN_MS = 3600000

function hooks.load(sid, cid)
  if is_removed('source', sid) then return nil end
  local call = redis.call('HGETALL', 'relay:call:' .. cid)
  if #call > 0 then return { call } end
  settle_owed(ARGV[1], sid, cid)
end

if ARGV[1] == 'enrich' then
  function hooks.on_settle(sid, cid, _, retry_at, put_again)
    if not retry_at then redis.call('ZREM', k_quarantine('enrich'), sid .. '\31' .. cid) end
    local due = earliest(retry_at, put_again)
    if not due then settle_owed('enrich', sid, cid) end
    return due
  end

  -- A quarantined call may still have to be published, so it is tried once more later; what was put meanwhile at once.
  function hooks.on_quarantine(_, _, put_again, now) return put_again or now + ENRICH_AGAIN_MS end
elseif ARGV[1] == 'record' then
  local function write_recording(sid, cid, recording, now)
    local k_call = 'relay:call:' .. cid
    redis.call('HSET', k_call, 'recording', recording)
    redis.call('HDEL', k_call, 'fetch')
    redis.call('HINCRBY', k_call, 'version', 1)
    owe('enrich', sid, cid, now, 'LT')
  end

  function hooks.on_settle(sid, cid, fields, retry_at, put_again, now)
    local k_call = 'relay:call:' .. cid
    local exists = (fields.recording or fields.fetch) and redis.call('EXISTS', k_call) == 1
    if exists and fields.recording then
      write_recording(sid, cid, fields.recording, now)
    elseif exists then
      redis.call('HSET', k_call, 'fetch', fields.fetch)
    end
    local due = retry_at
    if not due and not fields.recording then due = put_again end -- it had no audio to fetch, which may have changed
    if not due then settle_owed('record', sid, cid) end
    return due
  end

  -- Audio that killed five processes is not fetched any more: subscribers get the failure instead of waiting for ever.
  function hooks.on_quarantine(sid, cid, _, now)
    local exists = redis.call('EXISTS', 'relay:call:' .. cid) == 1
    if exists then write_recording(sid, cid, ARGV[5], now) end
    settle_owed('record', sid, cid)
  end
end
