-- The hooks of the lanes whose items are calls: enrich, contacts and record (see exchange.lua).
--
-- ARGV   [1] the lane
--        [2] of record: the recording part of a call whose audio is not fetched any more, packed
-- FIELDS of enrich:   contact_wanted  there when the call's contact is to be looked up: put into contacts
--        of contacts: contact    the call's contact: written to the call, which is due in enrich
--                     lookup     how far the attempts to look it up have come
--        of record:   recording  the call's recording, final: as contact
--                     fetch      how far the attempts to fetch it have come
--
-- Races closed here:
-- * a call is erased while its contact is looked up or its recording fetched: what arrives is not written.
-- * a part arrives while the call is enriched: the enrich lease remembers it (see put), so it is published.
-- * a call is enriched while its contact is looked up: 'NX' leaves that look-up and its backoff as they are.
-- * the number changes during a look-up: the contact found names the other number, so enrich wants one once more.
-- * a source is removed while its calls wait: the lane drops them; they are owed still, should it be added again.

local ENRICH_AGAIN_MS = 3600000

function hooks.load(sid, cid)
  if is_removed('source', sid) then return nil end
  local call = redis.call('HGETALL', 'relay:call:' .. cid)
  if #call > 0 then return { call } end
  settle_owed(ARGV[1], sid, cid)
end

-- `published` leaves out what equals the contact; from now on that is the former contact (as in ingest.lua the record)
local function keep_published_contact(k_call)
  local former = redis.call('HGET', k_call, 'contact')
  if former and redis.call('HEXISTS', k_call, 'published') == 1 then
    redis.call('HSETNX', k_call, 'published_contact', former)
  end
end

local function write_part(k_call, part, value, progress)
  if part == 'contact' then keep_published_contact(k_call) end
  redis.call('HSET', k_call, part, value)
  redis.call('HDEL', k_call, progress)
  redis.call('HINCRBY', k_call, 'version', 1)
end

-- Settle a lane that brings one part of a call: the part, or the progress towards it. When no more attempt is made,
-- enrich decides what follows.
local function bring(part, progress)
  return function(sid, cid, fields, retry_at, put_again, now)
    local k_call = 'relay:call:' .. cid
    if (fields[part] or fields[progress]) and redis.call('EXISTS', k_call) == 1 then
      if fields[part] then
        write_part(k_call, part, fields[part], progress)
      else
        redis.call('HSET', k_call, progress, fields[progress])
      end
      if not retry_at then owe('enrich', sid, cid, now, 'LT') end
    end
    local due = retry_at
    if not due and not fields[part] then due = put_again end -- there was nothing to do, which may have changed
    if not due then settle_owed(ARGV[1], sid, cid) end
    return due
  end
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
  hooks.on_settle = bring('contact', 'lookup')

  function hooks.on_quarantine(sid, cid) settle_owed('contacts', sid, cid) end
elseif ARGV[1] == 'record' then
  hooks.on_settle = bring('recording', 'fetch')

  -- Audio that killed five processes is not fetched any more: subscribers get the failure instead of waiting for ever.
  function hooks.on_quarantine(sid, cid, _, now)
    local k_call = 'relay:call:' .. cid
    if redis.call('EXISTS', k_call) == 1 then
      write_part(k_call, 'recording', ARGV[2], 'fetch')
      owe('enrich', sid, cid, now, 'LT')
    end
    settle_owed('record', sid, cid)
  end
end
