-- What became of some rows of a source, in one step.
--
-- KEYS   none
-- ARGV   source id, day, day before, day after, n, then n subscriptions, m, then m × (record key, call id)
-- REPLY  m × { flag of `seen` or '', 1 when that is filed under another day, 1 when the call is stored, 1 when it has ended,
--              1 when a lane holds it, then for each of its events a text: event id, 1|0 whether its document is stored,
--              and a word a subscription: - (no delivery) · delivered · missed · expired · failed · waiting · lost }
--
-- Races closed here:
-- * A call is ingested, published, delivered or erased meanwhile: mark, call, events, deliveries and lanes are read in one
--   step, so work that moves from one to the other is never missing in both.

local sid, day, before, after = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local subs = {}
for n = 1, tonumber(ARGV[5]) do subs[n] = ARGV[5 + n] end
local i = 6 + #subs

local function flag_of(key)
  for n, each in ipairs({ day, before, after }) do
    local mark = redis.call('HGET', 'relay:seen:' .. sid .. ':' .. each, key)
    if mark then return string.match(mark, '^%d+(%a)'), n > 1 and 1 or 0 end
  end
  return '', 0
end

local function holds(lane, p, item)
  return redis.call('ZSCORE', k_waiting(lane, p), item) or redis.call('ZSCORE', k_leased(lane, p), item)
end

local FATES = { delivered = 'delivered', missing = 'missed', dropped = 'missed', expired = 'expired',
  waiting = 'waiting', intent = 'waiting' }

local function fate_of(eid, cid, sub, state)
  if not state then return '-' end
  if string.find(state, '^%d') then return 'delivered' end
  local fate = state == '' and 'waiting' or FATES[string.match(state, '"s":"(%a+)"')] or 'failed'
  if fate == 'waiting' and not (redis.call('ZSCORE', k_pending(sub, cid), eid) and holds('deliver', sub, cid)) then
    return 'lost'
  end
  return fate
end

local rows = {}
for n = 1, tonumber(ARGV[i]) do
  local key, cid = ARGV[i + 2 * n - 1], ARGV[i + 2 * n]
  local call = redis.call('HMGET', 'relay:call:' .. cid, 'finished', 'events')
  local flag, other_day = flag_of(key)
  local held = call[1] and (holds('enrich', sid, cid) or holds('contacts', sid, cid)) and 1 or 0
  local row = { flag, other_day, call[1] and 1 or 0, call[1] == '1' and 1 or 0, held }
  for eid in string.gmatch(call[2] or '', '%S+') do
    local stored = redis.call('HMGET', 'relay:event:' .. eid, '=', unpack(subs))
    local words = { eid, stored[1] and '1' or '0' }
    for s, sub in ipairs(subs) do words[s + 2] = fate_of(eid, cid, sub, stored[s + 1]) end
    row[#row + 1] = table.concat(words, ' ')
  end
  rows[n] = row
end
return rows
