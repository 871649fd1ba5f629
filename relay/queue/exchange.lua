#!lua flags=allow-oom
-- Settle what a runner has done and claim what it does next, in one step.
--
-- KEYS   none (no cluster; names come from lane.lua)
-- ARGV   lane, an argument for the lane's hooks, process, number of this exchange within the process,
--        slots: free ones of the runner; unproven slots: as many of them as unproven partitions may have; reserve: as
--        many of them as only partitions without an item in flight may have;
--        suspect 1|0: an item with which three processes died may be claimed; items that one slot works on,
--        o, then o × (owner, slots that the runner uses for it),
--        n, then n × (partition, item, token, verb, wait_ms, health, k, k × (field, value))
--        verb: done    the work is finished; an item that was put during the lease is due again
--              retry   due wait_ms from now, or earlier when it was put during the lease
--              intent  the lease goes on; the lane writes down what is about to be done
--        health: '' or what the work showed about the partition: healthy · failing · unhealthy
--        fields: what the lane's hooks need to know
-- REPLY  { now_ms, wall_ms, next_due_ms or -1 when there is nothing that this runner could claim,
--        { accepted 1 or refused 0, … }, { claim, … } }
--        claim: { partition, item, token, deaths, proven 1|0, owner, …what the lane's hooks loaded }
-- HOOKS  functions that the lane's own Lua puts into `hooks`, each optional:
--        load(p, item)                                     values that a claim carries, nil when there is no work
--        on_intent(p, item, fields)                        whether the intent was written
--        on_settle(p, item, fields, retry_at, put_again, now)   when the item is due again, nil for never
--        on_quarantine(p, item, put_again, now)            the same, of an item that is being quarantined
--
-- Room: a partition has room for its limit in flight, one item while its circuit is open, one slot while it is unproven,
-- and what its rate allows, whether an item waits or its process died. A partition, and an owner that is a tenant, may also use only
-- as many slots of the runner as are still free beside them: whoever takes more leaves that many for others.
--
-- Races closed here:
-- * two runners claim: one of them gets the item (the claim moves it from waiting to leased).
-- * a runner settles after its process was taken for dead and the item was claimed by another: its token is old, the
--   settle is refused. A token names process and exchange, so none comes twice, whatever copy of the store is restored.
-- * an item is put while it is leased: the lease remembers it, the settle makes it due again (see lane.lua).
-- * a process dies: its leases end and are claimable again; after five ends in a row the item is quarantined.
-- * a call changes while the worker that will be the fifth to die has it: it is quarantined and due again at once.
-- * the store's memory is full: outcomes are accepted all the same (allow-oom), or everything would be sent again.

local lane, process, number = ARGV[1], ARGV[3], ARGV[4]
local slots, unproven_slots, reserve = tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7])
local suspect_allowed, batch = ARGV[8] == '1', tonumber(ARGV[9])
local now = now_ms()
local replies, touched, claims = {}, {}, {}
local owner_slots, owners = {}, tonumber(ARGV[10])
stale_groups = {}

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
    redis.call('HDEL', name, 'failures', 'unhealthy_in_a_row', 'failing_since', 'circuit_openings')
    redis.call('HSET', name, 'succeeded_at', wall_ms())
    return
  end
  redis.call('HINCRBY', name, 'failures', 1)
  redis.call('HSETNX', name, 'failing_since', wall_ms())
  if health == 'failing' then return end
  local in_a_row = redis.call('HINCRBY', name, 'unhealthy_in_a_row', 1)
  local state = redis.call('HMGET', name, 'circuit_opened_at', 'paused_until')
  if (in_a_row < 5 and not state[1]) or state[2] == 'inf' then return end
  if state[1] and (tonumber(state[2]) or 0) > now then return end -- an attempt from before the circuit opened
  local openings = redis.call('HINCRBY', name, 'circuit_openings', 1)
  redis.call('HSETNX', name, 'circuit_opened_at', wall_ms())
  redis.call('HSET', name, 'paused_until', now + math.min(30000 * 2 ^ (openings - 1), 600000))
end

local function settle(p, item, token, verb, wait, health, fields)
  local lease = lease_of(lane, p, item)
  if not lease or lease.token ~= token then return 0 end
  if verb == 'intent' then return on_intent(p, item, fields) and 1 or 0 end
  if health ~= '' then note_health(p, health) end
  local due = on_settle(p, item, fields, verb == 'retry' and now + wait or nil, lease.put_again, now)
  redis.call('ZREM', k_leased(lane, p), item)
  redis.call('HDEL', k_leases(lane, p), item)
  if due then redis.call('ZADD', k_waiting(lane, p), due, item) end
  touched[p] = true
  return 1
end

local i = 11
for _ = 1, owners do
  owner_slots[ARGV[i]] = tonumber(ARGV[i + 1])
  i = i + 2
end
local settlements = tonumber(ARGV[i])
i = i + 1
for n = 1, settlements do
  local fields = {}
  local after = i + 7 + 2 * tonumber(ARGV[i + 6])
  for f = i + 7, after - 1, 2 do fields[ARGV[f]] = ARGV[f + 1] end
  replies[n] = settle(ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 3], tonumber(ARGV[i + 4]), ARGV[i + 5], fields)
  i = after
end
for p in pairs(touched) do rescore(lane, p) end
rescore_stale_groups()

-- Five processes died with this item: a sixth must not claim it. The lane decides whether and when it is tried once more.
local function quarantine(p, item, lease)
  redis.call('ZADD', k_quarantine(lane), wall_ms(), p .. '\31' .. item)
  redis.call('HINCRBY', 'relay:counts', 'quarantined_' .. lane, 1)
  local due = on_quarantine(p, item, lease.put_again, now)
  forget(lane, p, item)
  if due then redis.call('ZADD', k_waiting(lane, p), due, item) end
end

-- Lease one item, unless there turns out to be nothing to claim; returns whether there was.
local function take(p, item, lease, proven, owner)
  local deaths = lease and lease.deaths + 1 or 0
  if deaths >= 5 then
    quarantine(p, item, lease)
    return false
  end
  -- What may kill this process runs while no other such item does, so that it is known which of them did.
  if deaths >= 3 and not suspect_allowed then return false end
  local payload = load(p, item)
  if not payload then
    forget(lane, p, item)
    return false
  end
  if deaths >= 3 then suspect_allowed = false end
  local token = process .. ':' .. number .. ':' .. #claims
  redis.call('ZREM', k_waiting(lane, p), item)
  redis.call('ZADD', k_leased(lane, p), 'inf', item)
  write_lease(lane, p, item, { token = token, deaths = deaths })
  claims[#claims + 1] = { p, item, token, deaths, proven and 1 or 0, owner, unpack(payload) }
  return true
end

-- How many more of the free slots one may use that uses `used` so far: as many as stay free beside the reserve. The
-- first is always allowed, so that hundreds that die at the same moment, with a good record, leave the reserve to others.
local function fair_share(used, free)
  local share = math.floor((free - reserve - used) / 2)
  return used == 0 and math.max(1, share) or share
end

-- Claim from one partition for at most `most` slots; returns how many were used.
local function claim_from(p, most, proven, owner)
  local name = k_partition(lane, p)
  local rule = redis.call('HMGET', name, 'cap', 'circuit_opened_at', 'interval', 'slack', 'tat')
  local live = redis.call('ZCOUNT', k_leased(lane, p), 'inf', 'inf')
  most = math.min(most, fair_share(math.ceil(live / batch), slots))
  local room = most * batch
  if rule[1] then room = math.min(room, tonumber(rule[1]) - live) end
  if rule[2] then room = math.min(room, 1 - live) end
  if not proven then room = live == 0 and math.min(room, batch) or 0 end
  local interval, tat = tonumber(rule[3]), math.max(tonumber(rule[5]) or 0, now)
  if interval then room = math.min(room, math.floor((now + tonumber(rule[4]) - tat) / interval) + 1) end
  if room <= 0 then return 0 end
  local taken = 0
  for _, item in ipairs(redis.call('ZRANGEBYSCORE', k_leased(lane, p), '-inf', now, 'LIMIT', 0, room)) do
    if take(p, item, lease_of(lane, p, item), proven, owner) then taken = taken + 1 end
  end
  if room > taken then
    for _, item in ipairs(redis.call('ZRANGEBYSCORE', k_waiting(lane, p), '-inf', now, 'LIMIT', 0, room - taken)) do
      if take(p, item, nil, proven, owner) then taken = taken + 1 end
    end
  end
  if taken == 0 then return 0 end
  if interval then redis.call('HSET', name, 'tat', string.format('%.3f', tat + taken * interval)) end
  redis.call('SADD', k_held(process), lane .. '\31' .. p)
  return math.ceil(taken / batch)
end

local function owner_share(owner)
  if owner == '' then return slots end -- the operator's
  return fair_share(owner_slots[owner] or 0, slots)
end

-- Claim for at most `most` slots from partitions of one standing: owners in turn, and each owner's partitions in turn.
-- Those that get nothing have had their turn too, or they would hide the ones behind them.
local function claim(standing, most)
  local used = 0
  -- Only an owner that uses slots can have no share left, so as many groups more are enough to find the others.
  local groups = most > 0 and redis.call('ZRANGEBYSCORE', k_index(lane, standing), '-inf', now + 0.999, 'LIMIT', 0,
    most + owners) or {}
  for g, group in ipairs(groups) do
    local owner = string.sub(group, #standing + 2)
    local share = math.min(math.ceil((most - used) / (#groups - g + 1)), owner_share(owner))
    if share > 0 then
      local partitions = redis.call('ZRANGEBYSCORE', k_group(lane, group), '-inf', now + 0.999, 'LIMIT', 0, share)
      for n, p in ipairs(partitions) do
        local taken = claim_from(p, math.ceil(share / (#partitions - n + 1)), standing == 'proven', owner)
        share, slots, used = share - taken, slots - taken, used + taken
        if owner ~= '' then owner_slots[owner] = (owner_slots[owner] or 0) + taken end
        redis.call('HSET', k_partition(lane, p), 'served', next_turn())
        rescore(lane, p, group)
        if share <= 0 then break end
      end
    end
    redis.call('HSET', k_turns(lane), group, next_turn())
    group_changed(lane, group)
    if used >= most then break end
  end
  return used
end

local function next_due(standing)
  local heads = redis.call('ZRANGE', k_index(lane, standing), 0, owners, 'WITHSCORES')
  for n = 1, #heads, 2 do
    if heads[n + 1] ~= 'inf' and owner_share(string.sub(heads[n], #standing + 2)) > 0 then
      return tonumber(heads[n + 1])
    end
  end
end

local due = nil
if slots > 0 then
  redis.call('ZADD', 'relay:processes', now, process) -- no lease without a process that can be found dead
  unproven_slots = unproven_slots - claim('unproven', math.min(unproven_slots, slots))
  claim('proven', slots)
  rescore_stale_groups()
  due = next_due('proven')
  if unproven_slots > 0 then due = earliest(due, next_due('unproven')) end
end
return { now, wall_ms(), due and math.ceil(due) or -1, replies, claims }
