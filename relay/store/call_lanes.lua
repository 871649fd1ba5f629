-- The hooks of the lanes whose items are calls, enrich and record (see exchange.lua).
--
-- ARGV   [1] the lane
-- FIELDS of record: recording  the call's recording, final: written to the call, which is due in enrich
--                   fetch      how far the attempts to fetch it have come
--
-- Races closed here:
-- * a call is erased while its recording is fetched: what arrives is not written.
-- * a recording arrives while the call is enriched: the enrich lease remembers it (see put), so it is published.

local ENRICH_AGAIN_MS = 3600000

function hooks.load(_, cid)
  local call = redis.call('HGETALL', 'relay:call:' .. cid)
  if #call == 0 then return nil end
  return { call }
end

if ARGV[1] == 'enrich' then
  function hooks.on_settle(sid, cid, _, retry_at, put_again)
    if not retry_at then redis.call('ZREM', k_quarantine('enrich'), sid .. '\31' .. cid) end
    return earliest(retry_at, put_again)
  end

  -- A quarantined call may still have to be published, so it is tried once more later; what was put meanwhile at once.
  function hooks.on_quarantine(_, _, put_again, now) return put_again or now + ENRICH_AGAIN_MS end
elseif ARGV[1] == 'record' then
  function hooks.on_settle(sid, cid, fields, retry_at, put_again, now)
    local k_call = 'relay:call:' .. cid
    local exists = (fields.recording or fields.fetch) and redis.call('EXISTS', k_call) == 1
    if exists and fields.recording then
      redis.call('HSET', k_call, 'recording', fields.recording)
      redis.call('HDEL', k_call, 'fetch')
      redis.call('HINCRBY', k_call, 'version', 1)
      put('enrich', sid, cid, now, 'LT')
    elseif exists then
      redis.call('HSET', k_call, 'fetch', fields.fetch)
    end
    if retry_at or fields.recording then return retry_at end
    return put_again -- it had no audio to fetch, which may be another matter now
  end
end
