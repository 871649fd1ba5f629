-- Publish: write parts of a call, its events and their deliveries, in one step or not at all.
--
-- KEYS   none
-- ARGV   call id ('' for an event without a call), version as it was read, ordering key, call TTL s, event TTL s,
--        n, then n × (field, value) of the call, or value '' to remove the field,
--        m, then m × (event id, packed event, k, then k × (subscription, state of its delivery))
-- REPLY  -1 when the call changed since it was read (nothing was done), else the number of new deliveries
--
-- Races closed here:
-- * The record, the contact or the recording changes between reading the call and publishing: every write raises
--   `version`, so the publish is refused and the caller reads again.
-- * Two holders of one call (a lease that ended) publish the same difference: the second finds another version.
-- * An event exists already (the call was erased and found again): it keeps its body, and a subscription that has a
--   delivery of it gets no second one. Events that are new are numbered after it.
-- * A subscription is disabled meanwhile: nothing is queued for it, and its delivery is recorded as missing. One that is
--   being deleted, or was, gets no delivery at all.

local cid, version, ordering_key = ARGV[1], ARGV[2], ARGV[3]
local call_ttl, event_ttl = tonumber(ARGV[4]), tonumber(ARGV[5])
local k_call = 'relay:call:' .. cid
if cid ~= '' and redis.call('HGET', k_call, 'version') ~= version then return -1 end

local now = now_ms()
local sid = cid ~= '' and redis.call('HGET', k_call, 'source')
local i = 7
for _ = 1, tonumber(ARGV[6]) do
  if ARGV[i + 1] == '' then redis.call('HDEL', k_call, ARGV[i]) else redis.call('HSET', k_call, ARGV[i], ARGV[i + 1]) end
  i = i + 2
end
if cid ~= '' then
  redis.call('HINCRBY', k_call, 'version', 1)
  redis.call('EXPIRE', k_call, call_ttl)
end

local function add_to_call(eid)
  local eids = redis.call('HGET', k_call, 'events')
  if not eids then
    redis.call('HSET', k_call, 'events', eid)
  elseif not string.find(eids, eid, 1, true) then
    redis.call('HSET', k_call, 'events', eids .. ' ' .. eid)
  end
end

local queued = 0
local events = tonumber(ARGV[i])
i = i + 1
for _ = 1, events do
  local eid, body, subs = ARGV[i], ARGV[i + 1], tonumber(ARGV[i + 2])
  i = i + 3
  local k_event = 'relay:event:' .. eid
  if redis.call('HSETNX', k_event, '=', body) == 1 then redis.call('HINCRBY', 'relay:counts', 'events', 1) end
  redis.call('ZADD', 'relay:events', 'NX', now, eid)
  if sid then
    redis.call('ZADD', 'relay:events:' .. sid, 'NX', now, eid)
    add_to_call(eid)
  end
  local sequence = redis.call('HGET', k_event, '#')
  if not sequence then
    sequence = cid ~= '' and redis.call('HINCRBY', k_call, 'sequence', 1) or 0
    redis.call('HSET', k_event, '#', sequence)
  elseif cid ~= '' and tonumber(sequence) > tonumber(redis.call('HGET', k_call, 'sequence') or 0) then
    redis.call('HSET', k_call, 'sequence', sequence)
  end
  for s = 1, subs do
    local sub, state = ARGV[i], ARGV[i + 1]
    i = i + 2
    local disabled = redis.call('HGET', k_partition('deliver', sub), 'disabled')
    if disabled ~= 'deleted' and not is_removed('subscription', sub) and redis.call('HEXISTS', k_event, sub) == 0 then
      redis.call('ZADD', 'relay:deliveries-of:' .. sub, 'NX', now, eid)
      if disabled then
        redis.call('HSET', k_event, sub, '{"s":"missing"}')
      else
        redis.call('HSET', k_event, sub, state)
        redis.call('ZADD', k_pending(sub, ordering_key), sequence, eid)
        owe('deliver', sub, ordering_key, now, 'NX')
        queued = queued + 1
      end
    end
  end
  redis.call('EXPIRE', k_event, event_ttl)
end
return queued
