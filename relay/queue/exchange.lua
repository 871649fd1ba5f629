#!lua flags=allow-oom
-- Settle what a runner has done and claim what it does next, in one step.
--
-- KEYS   none (no cluster; names come from lane.lua)
-- ARGV   lane, want, lease_ms, most per partition, an argument for the lane's hooks,
--        n, then n × (partition, item, token, verb, wait_ms, health, k, k × (field, value))
--        verb: done    the work is finished; an item that was put during the lease is due again
--              retry   due wait_ms from now, or earlier when it was put during the lease
--              renew   the lease goes on for lease_ms from now
--              intent  the lease goes on; the lane writes down what is about to be done
--        health: '' or what the attempt showed about the partition: healthy · failing · unhealthy
--        fields: what the lane's hooks need to know
-- REPLY  { now_ms, next_due_ms or -1, { accepted 1 or refused 0, … }, { claim, … } }
--        claim: { partition, item, token, expiries, …what the lane's hooks loaded }
-- HOOKS  functions that the lane's own Lua puts into `hooks`, each optional:
--        load(p, item)                                     values that a claim carries, nil when there is no work
--        on_intent(p, item, fields)                        whether the intent was written
--        on_settle(p, item, fields, retry_at, put_again, now)   when the item is due again, nil for never
--        on_quarantine(p, item, put_again, now)            the same, of an item that is being quarantined
--
-- Races closed here:
-- * two runners claim: one of them gets the item (the claim moves it from waiting to leased).
-- * a runner settles after its lease ended and the item was claimed by another: its token is old, the settle is refused.
-- * an item is put while it is leased: the lease remembers it, the settle makes it due again (see lane.lua).
-- * a process dies: its leases end and are claimable again; after five ends in a row the item is quarantined.
-- * a call changes while the worker that will be the fifth to die has it: it is quarantined and due again at once.
-- * the store's memory is full: outcomes are accepted all the same (allow-oom), or everything would be sent again.

local lane, want, lease_ms, most = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local now = now_ms()
local replies, touched = {}, {}

local load = hooks.load or function() return {} end
local on_intent = hooks.on_intent or function() return false end
local on_settle = hooks.on_settle or function(_, _, _, retry_at, put_again) return earliest(retry_at, put_again) end
local on_quarantine = hooks.on_quarantine or function(_, _, put_again) return put_again end

-- The health of a partition, and its circuit breaker: after five unhealthy attempts in a row nothing is claimed for a
-- while (30 s, doubled up to 10 min); then one probe at a time, until one succeeds.
local function note_health(p, health)
  local name = k_partition(lane, p)
  if health == 'healthy' then
    if redis.call('HDEL', name, 'circuit_opened_at') == 1 and redis.call('HGET', name, 'paused_until') ~= 'inf' then
      redis.call('HDEL', name, 'paused_until') -- the circuit's own pause; a partition that is disabled stays so
    end
    redis.call('HDEL', name, 'unhealthy_in_a_row', 'failing_since', 'circuit_openings')
    redis.call('HSET', name, 'succeeded_at', now)
    return
  end
  redis.call('HSETNX', name, 'failing_since', now)
  if health == 'failing' then return end
  local in_a_row = redis.call('HINCRBY', name, 'unhealthy_in_a_row', 1)
  local state = redis.call('HMGET', name, 'circuit_opened_at', 'paused_until')
  if (in_a_row < 5 and not state[1]) or state[2] == 'inf' then return end
  if state[1] and (tonumber(state[2]) or 0) > now then return end -- an attempt from before the circuit opened
  local openings = redis.call('HINCRBY', name, 'circuit_openings', 1)
  redis.call('HSETNX', name, 'circuit_opened_at', now)
  redis.call('HSET', name, 'paused_until', now + math.min(30000 * 2 ^ (openings - 1), 600000))
end

local function settle(p, item, token, verb, wait, health, fields)
  local lease = lease_of(lane, p, item)
  if not lease or lease.token ~= token then return 0 end
  if verb == 'renew' then
    redis.call('ZADD', k_leased(lane, p), now + lease_ms, item)
    touched[p] = true
    return 1
  elseif verb == 'intent' then
    return on_intent(p, item, fields) and 1 or 0
  end
  if health ~= '' then note_health(p, health) end
  local due = on_settle(p, item, fields, verb == 'retry' and now + wait or nil, lease.put_again, now)
  redis.call('ZREM', k_leased(lane, p), item)
  redis.call('HDEL', k_leases(lane, p), item)
  if due then redis.call('ZADD', k_waiting(lane, p), due, item) end
  touched[p] = true
  return 1
end

local i = 7
for n = 1, tonumber(ARGV[6]) do
  local fields = {}
  local after = i + 7 + 2 * tonumber(ARGV[i + 6])
  for f = i + 7, after - 1, 2 do fields[ARGV[f]] = ARGV[f + 1] end
  replies[n] = settle(ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 3], tonumber(ARGV[i + 4]), ARGV[i + 5], fields)
  i = after
end
for p in pairs(touched) do rescore(lane, p) end

local claims, alone = {}, false

-- Five processes died with this item: a sixth must not claim it. The lane decides whether and when it is tried once more.
local function quarantine(p, item, lease)
  redis.call('ZADD', k_quarantine(lane), now, p .. '\31' .. item)
  redis.call('HINCRBY', 'relay:counts', 'quarantined_' .. lane, 1)
  local due = on_quarantine(p, item, lease.put_again, now)
  forget(lane, p, item)
  if due then redis.call('ZADD', k_waiting(lane, p), due, item) end
end

-- Lease one item, unless there turns out to be nothing to claim.
local function take(p, item, lease)
  local expiries = lease and lease.expiries + 1 or 0
  if expiries >= 5 then
    quarantine(p, item, lease)
    return
  end
  if expiries >= 3 and #claims > 0 then return end -- claimed alone, by a later call
  local payload = load(p, item)
  if not payload then
    forget(lane, p, item)
    return
  end
  -- With the time in it no token comes twice, not even when an older copy of the store is restored.
  local token = string.format('%.0f', now * 1000 + redis.call('INCR', 'relay:token') % 1000)
  redis.call('ZREM', k_waiting(lane, p), item)
  redis.call('ZADD', k_leased(lane, p), now + lease_ms, item)
  write_lease(lane, p, item, { token = token, expiries = expiries })
  claims[#claims + 1] = { p, item, token, expiries, unpack(payload) }
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
    local rule = redis.call('HMGET', k_partition(lane, p), 'cap', 'circuit_opened_at', 'interval', 'slack', 'tat')
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
return { now, next_due, replies, claims }
