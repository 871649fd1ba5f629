#!lua flags=allow-oom
-- Settle what a runner has done and claim what it does next, in one step.
--
-- KEYS   none (no cluster; names come from lane.lua)
-- ARGV   lane, want, lease_ms, most per partition, event TTL s,
--        n, then n × (partition, item, token, verb, wait_ms, a, b, c)
--        verb: done   the item's work is finished; when it was put again meanwhile it is due again
--              again  due wait_ms from now, or earlier when it was put again meanwhile
--              renew  the lease goes on for lease_ms from now
--              intent (deliver lane) the item stays held; b is written down before the subscriber is dialled
--              part   (record lane) like done; b is the call's recording part: stored, and the call put into enrich
--        deliver lane: a = event id, b = state of the delivery; done takes the event off the subject's pending ones
--        c tells the health of the partition: s heard · f not heard, looks unwell · n not heard · x given up
--        record lane: b with again = how far fetching has come
-- ANSWER { now_ms, next_due_ms or -1, { settled 1 or refused 0, … }, { claim, … } }
--        claim: { partition, item, token, expiries, …what the lane's work needs }
--        enrich, record: the call's HASH, flat; deliver: event id, packed event or '', state or ''
--
-- Races closed here:
-- * two runners claim: one of them gets the item (the claim moves it from waiting to leased).
-- * a runner settles after its lease ended and the item went to another: its token is old, the settle is refused.
-- * an item is put while it is held: the lease is dirty, settling re-arms it (see lane.lua).
-- * a runner dies: its leases end and are claimable again; after five ends in a row the item is put aside.
-- * an event is erased while it is attempted: nothing of the attempt is written down, what follows it goes on.
-- * a call changes while the worker that will be the fifth to die holds it: it is put aside and due again at once.
-- * the store's memory is full: outcomes are kept all the same (allow-oom), or everything would be sent again.

local lane, want, lease_ms = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local most, event_ttl = tonumber(ARGV[4]), tonumber(ARGV[5])
local now = now_ms()
local answers, touched = {}, {}

-- The health of a subscription, and its breaker: after five attempts in a row that looked unwell nothing is claimed for
-- a while (30 s, doubled up to 10 min); then one probe at a time, until one is heard.
local function health(p, c)
  local name = k_partition(lane, p)
  if c == 's' then
    redis.call('HDEL', name, 'unwell', 'failing_since', 'opened', 'opens')
    if redis.call('HDEL', name, 'breaker') == 1 and redis.call('HGET', name, 'gate') ~= 'inf' then
      redis.call('HDEL', name, 'gate') -- the breaker's own; one that is shut for good stays
    end
    redis.call('HSET', name, 'heard', now)
  elseif c ~= '' then
    redis.call('HSETNX', name, 'failing_since', now)
    if c ~= 'f' then return end
    local unwell = redis.call('HINCRBY', name, 'unwell', 1)
    local open = redis.call('HEXISTS', name, 'breaker') == 1
    if (unwell >= 5 or open) and redis.call('HGET', name, 'gate') ~= 'inf' then
      local until_now = tonumber(redis.call('HGET', name, 'gate')) or 0
      if open and until_now > now then return end -- an attempt from before it opened
      local opens = redis.call('HINCRBY', name, 'opens', 1)
      redis.call('HSETNX', name, 'opened', now)
      redis.call('HSET', name, 'breaker', 'open', 'gate', now + math.min(30000 * 2 ^ (opens - 1), 600000))
    end
  end
end

local function settle(p, item, token, verb, wait, a, b, c)
  local lease = lease_of(lane, p, item)
  if not lease or lease.token ~= token then return 0 end
  if verb == 'renew' then
    redis.call('ZADD', k_leased(lane, p), now + lease_ms, item)
    touched[p] = true
    return 1
  elseif verb == 'intent' then
    if not redis.call('ZSCORE', k_pending(p, item), a) then return 0 end
    redis.call('HSET', 'relay:event:' .. a, p, b)
    redis.call('EXPIRE', 'relay:event:' .. a, event_ttl)
    return 1
  end
  if lane == 'record' and verb ~= 'done' then lease.dirty = nil end -- only an item that was let go looks again
  local at = nil
  if verb == 'again' then
    at = now + wait
    if lease.dirty and lease.dirty < at then at = lease.dirty end
  elseif lease.dirty then
    at = lease.dirty
  end
  if lane == 'enrich' and verb == 'done' then
    redis.call('ZREM', k_quarantine(lane), p .. '\31' .. item)
  elseif lane == 'deliver' and a ~= '' then
    health(p, c)
    local pending = redis.call('ZSCORE', k_pending(p, item), a)
    if pending and b ~= '' then
      redis.call('HSET', 'relay:event:' .. a, p, b)
      redis.call('EXPIRE', 'relay:event:' .. a, event_ttl)
      if c == 'x' then redis.call('ZADD', 'relay:dead', now, p .. '\31' .. a) end
    end
    if verb == 'done' then redis.call('ZREM', k_pending(p, item), a) end
    if verb == 'done' or not pending then
      at = redis.call('EXISTS', k_pending(p, item)) == 1 and now or nil
    end
  elseif lane == 'record' and b ~= '' and redis.call('EXISTS', 'relay:call:' .. item) == 1 then
    if verb == 'part' then
      redis.call('HSET', 'relay:call:' .. item, 'recording', b)
      redis.call('HDEL', 'relay:call:' .. item, 'fetch')
      redis.call('HINCRBY', 'relay:call:' .. item, 'version', 1)
      put('enrich', p, item, now, 'LT')
    else
      redis.call('HSET', 'relay:call:' .. item, 'fetch', b)
    end
  end
  redis.call('ZREM', k_leased(lane, p), item)
  redis.call('HDEL', k_leases(lane, p), item)
  if at then redis.call('ZADD', k_waiting(lane, p), at, item) end
  touched[p] = true
  return 1
end

local i = 7
for n = 1, tonumber(ARGV[6]) do
  answers[n] = settle(ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 3], tonumber(ARGV[i + 4]), ARGV[i + 5], ARGV[i + 6],
    ARGV[i + 7])
  i = i + 8
end
for p in pairs(touched) do rescore(lane, p) end

local claims, alone = {}, false

local function payload(p, item, claim)
  if lane == 'deliver' then
    local eid = redis.call('ZRANGE', k_pending(p, item), 0, 0)[1]
    if not eid then return false end
    local event = redis.call('HMGET', 'relay:event:' .. eid, '=', p)
    claim[5], claim[6], claim[7] = eid, event[1] or '', event[2] or ''
  elseif lane == 'enrich' or lane == 'record' then
    claim[5] = redis.call('HGETALL', 'relay:call:' .. item)
    if #claim[5] == 0 then return false end
  end
  return true
end

-- What killed five workers is kept from the sixth. A call may still have to be told, so it is tried again after an hour;
-- what was put meanwhile has a try of its own at once.
local function put_aside(p, item, lease)
  local again = lease.dirty or (lane == 'enrich' and now + 3600000)
  redis.call('ZADD', k_quarantine(lane), now, p .. '\31' .. item)
  redis.call('HINCRBY', 'relay:counts', 'quarantined_' .. lane, 1)
  local eid = lane == 'deliver' and redis.call('ZRANGE', k_pending(p, item), 0, 0)[1]
  if eid then
    local state = redis.call('HGET', 'relay:event:' .. eid, p)
    if not state or state == '' then state = '{"s":"waiting","t":' .. string.format('%.0f', now) .. '}' end
    redis.call('HSET', 'relay:event:' .. eid, p, (string.gsub(state, '"s":"%a+"', '"s":"poison"', 1)))
    redis.call('EXPIRE', 'relay:event:' .. eid, event_ttl)
    redis.call('ZADD', 'relay:dead', now, p .. '\31' .. eid)
    redis.call('ZREM', k_pending(p, item), eid)
    if redis.call('EXISTS', k_pending(p, item)) == 1 then again = now end
  end
  forget(lane, p, item)
  if again then redis.call('ZADD', k_waiting(lane, p), again, item) end
end

-- Lease one item, unless there is nothing to hand out after all.
local function take(p, item, lease)
  local expiries = lease and lease.expiries + 1 or 0
  if expiries >= 5 then
    put_aside(p, item, lease)
    return
  end
  if expiries >= 3 and #claims > 0 then return end -- claimed alone, by a later call
  -- With the time in it no token comes twice, not even when an older copy of the store is put back.
  local token = string.format('%.0f', now * 1000 + redis.call('INCR', 'relay:token') % 1000)
  local claim = { p, item, token, expiries }
  if not payload(p, item, claim) then
    forget(lane, p, item)
    return
  end
  redis.call('ZREM', k_waiting(lane, p), item)
  redis.call('ZADD', k_leased(lane, p), now + lease_ms, item)
  write_lease(lane, p, item, { token = token, expiries = expiries })
  claims[#claims + 1] = claim
  alone = expiries >= 3
end

if want > 0 then
  local partitions = redis.call('ZRANGEBYSCORE', k_index(lane), '-inf', now + 0.999, 'LIMIT', 0, want)
  for _, p in ipairs(partitions) do
    if #claims >= want or alone then break end
    local room = math.min(want - #claims, most)
    local started = #claims
    local ended = redis.call('ZRANGEBYSCORE', k_leased(lane, p), '-inf', now, 'LIMIT', 0, room)
    for _, item in ipairs(ended) do
      if alone then break end
      take(p, item, lease_of(lane, p, item))
    end
    local rule = redis.call('HMGET', k_partition(lane, p), 'cap', 'breaker', 'interval', 'slack', 'tat')
    local cap = rule[2] and 1 or tonumber(rule[1])
    room = room - (#claims - started)
    if cap then room = math.min(room, cap - redis.call('ZCARD', k_leased(lane, p))) end
    local interval, tat = tonumber(rule[3]), math.max(tonumber(rule[5]) or 0, now)
    if interval then room = math.min(room, math.floor((now + tonumber(rule[4]) - tat) / interval) + 1) end
    if room > 0 and not alone then
      local due = redis.call('ZRANGEBYSCORE', k_waiting(lane, p), '-inf', now, 'LIMIT', 0, room)
      for _, item in ipairs(due) do take(p, item, nil) end
    end
    if interval and #claims > started then
      redis.call('HSET', k_partition(lane, p), 'tat', string.format('%.3f', tat + (#claims - started) * interval))
    end
    if #claims > started then redis.call('HSET', k_partition(lane, p), 'served', moment_ms()) end
    rescore(lane, p)
  end
end

local head = redis.call('ZRANGE', k_index(lane), 0, 0, 'WITHSCORES')
local next_due = -1
if head[2] and head[2] ~= 'inf' then next_due = tonumber(head[2]) end
return { now, next_due, answers, claims }
