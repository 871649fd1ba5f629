-- The hooks of the lanes whose items are calls: enrich, contacts and record (see exchange.lua).
--
-- ARGV   [1] the lane
--        [2] of record: the recording part of a call whose audio is not fetched any more, packed
-- FIELDS of enrich:   contact_wanted  there when the call's contact is to be looked up: put into contacts
--        of contacts: contact_found  there when the contact was found and published
--                     lookup         how far the attempts to look it up have come
--        of record:   recording      the call's recording, final: written to the call, which is due in enrich
--                     fetch          how far the attempts to fetch it have come
--
-- Races closed here:
-- * a call is erased while its contact is looked up or its recording fetched: nothing is written.
-- * a recording arrives while the call is enriched: the enrich lease remembers it (see put), so it is published.
-- * a call is enriched while its contact is looked up: 'NX' leaves that look-up and its backoff as they are.
-- * the number changes during a look-up: the call is due in enrich after it, which then wants another contact.
-- * a source is removed while its calls wait: the lane drops them; they are owed still, should it be added again.

local ENRICH_AGAIN_MS = 3600000

function hooks.load(sid, cid)
  if is_removed('source', sid) then return nil end
  local call = redis.call('HGETALL', 'relay:call:' .. cid)
  if #call > 0 then return { call } end
  settle_owed(ARGV[1], sid, cid)
end

local function write_recording(sid, cid, recording, now)
  local k_call = 'relay:call:' .. cid
  redis.call('HSET', k_call, 'recording', recording)
  redis.call('HDEL', k_call, 'fetch')
  redis.call('HINCRBY', k_call, 'version', 1)
  owe('enrich', sid, cid, now, 'LT')
end

if ARGV[1] == 'enrich' then
  function hooks.on_settle(sid, cid, fields, retry_at, put_again, now)
    if fields.contact_wanted then owe('contacts', sid, cid, now, 'NX') end
    if not retry_at then redis.call('ZREM', k_quarantine('enrich'), sid .. '\31' .. cid) end
    local due = earliest(retry_at, put_again)
    if not due then settle_owed('enrich', sid, cid) end
    return due
  end

  -- A quarantined call may still have to be published, so it is tried once more later; what was put meanwhile at once.
  function hooks.on_quarantine(_, _, put_again, now) return put_again or now + ENRICH_AGAIN_MS end
elseif ARGV[1] == 'contacts' then
  function hooks.on_settle(sid, cid, fields, retry_at, put_again, now)
    local exists = (fields.contact_found or fields.lookup) and redis.call('EXISTS', 'relay:call:' .. cid) == 1
    if exists and fields.lookup then redis.call('HSET', 'relay:call:' .. cid, 'lookup', fields.lookup) end
    if exists and not retry_at then owe('enrich', sid, cid, now, 'LT') end
    local due = earliest(retry_at, put_again)
    if not due then settle_owed('contacts', sid, cid) end
    return due
  end

  function hooks.on_quarantine(sid, cid) settle_owed('contacts', sid, cid) end
elseif ARGV[1] == 'record' then
  function hooks.on_settle(sid, cid, fields, retry_at, put_again, now)
    local exists = (fields.recording or fields.fetch) and redis.call('EXISTS', 'relay:call:' .. cid) == 1
    if exists and fields.recording then
      write_recording(sid, cid, fields.recording, now)
    elseif exists then
      redis.call('HSET', 'relay:call:' .. cid, 'fetch', fields.fetch)
    end
    local due = retry_at
    if not due and not fields.recording then due = put_again end -- it had no audio to fetch, which may have changed
    if not due then settle_owed('record', sid, cid) end
    return due
  end

  -- Audio that killed five processes is not fetched any more: subscribers get the failure instead of waiting for ever.
  function hooks.on_quarantine(sid, cid, _, now)
    if redis.call('EXISTS', 'relay:call:' .. cid) == 1 then write_recording(sid, cid, ARGV[2], now) end
    settle_owed('record', sid, cid)
  end
end
