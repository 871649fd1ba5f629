-- What every script that touches a lane shares: the clock, key names, standing, the index, leases, put. Loaded in front
-- of the others.
--
-- A lane has partitions; a partition has waiting items (a ZSET by due) and leased ones (a ZSET whose score is +inf while
-- the lease holds, the moment of its end afterwards, and a HASH with token|deaths|due of a put during the lease). A lease
-- ends with its process, not with time: heartbeat.lua ends those of a dead process.
--
-- The index has three levels: standing → owner → partition, each scored by the earliest moment at which something can be
-- claimed there. A partition is proven when its last success is less than a day old and fewer than three attempts failed
-- since; everything else is unproven and leased one item at a time. A partition's own moment is its earliest waiting item
-- or ended lease; not while it is paused or full, and not faster than its rate. Every change of a partition ends with
-- `rescore`, so a claim never scans partitions from which nothing may be claimed.
--
-- Owners, and partitions of one owner, take turns: one that was served is scored behind those that became due before
-- that, however long its own backlog has been due. Otherwise a flood in some would be drained before the first item of
-- any other, and a tenant with thousands of partitions would be served before one that has a single partition.

local PROVEN_FOR_MS, PROVEN_FAILURES = 86400000, 3

-- The relay's clock: TIME plus an offset that grows when TIME steps back, so that it never goes back itself and nothing
-- that waits is frozen until TIME has caught up. The offset shrinks by a tenth of the time that passes. One moment a
-- script.
local moment = nil
local function clock()
  if moment then return moment end
  local t = redis.call('TIME')
  local time = tonumber(t[1]) * 1000 + tonumber(t[2]) / 1000
  local state = redis.call('HMGET', 'relay:clock', 'last', 'offset')
  local offset = tonumber(state[2]) or 0
  local passed = time + offset - (tonumber(state[1]) or 0)
  if passed < 0 then
    offset = offset - passed
  else
    offset = math.max(offset - passed / 10, 0)
  end
  moment = { now = time + offset, wall = time }
  redis.call('HSET', 'relay:clock', 'last', string.format('%.3f', moment.now), 'offset', string.format('%.3f', offset))
  return moment
end

-- By which everything is scheduled.
local function now_ms() return math.floor(clock().now) end

-- TIME as the server has it, right or wrong: for what people read, nothing is scheduled by it.
local function wall_ms() return math.floor(clock().wall) end

-- Moments that keep turns of one script apart, in thousandths of a millisecond.
local turns = 0
local function next_turn()
  turns = turns + 0.001
  return string.format('%.3f', clock().now + turns)
end

local function k_index(lane, standing) return 'relay:index:' .. lane .. ':' .. standing end
local function k_group(lane, group) return 'relay:group:' .. lane .. ':' .. group end
local function k_turns(lane) return 'relay:turns:' .. lane end
local function k_waiting(lane, p) return 'relay:lane:' .. lane .. ':' .. p end
local function k_leased(lane, p) return 'relay:leased:' .. lane .. ':' .. p end
local function k_leases(lane, p) return 'relay:leases:' .. lane .. ':' .. p end
local function k_partition(lane, p) return 'relay:partition:' .. lane .. ':' .. p end
local function k_quarantine(lane) return 'relay:quarantined:' .. lane end
local function k_held(process) return 'relay:held:' .. process end

-- What a lane does beside the queue's own work; exchange.lua describes the functions and has defaults for them.
local hooks = {}

local function earliest(a, b)
  if a and b then return math.min(a, b) end
  return a or b
end

-- `group` is standing:owner.
local function rescore_group(lane, group)
  local standing = string.match(group, '^%a+')
  local head = redis.call('ZRANGE', k_group(lane, group), 0, 0, 'WITHSCORES')
  if head[1] then
    local turn = tonumber(redis.call('HGET', k_turns(lane), group)) or 0
    redis.call('ZADD', k_index(lane, standing), math.max(tonumber(head[2]), turn), group)
  else
    redis.call('ZREM', k_index(lane, standing), group)
    redis.call('HDEL', k_turns(lane), group)
  end
end

-- A script that changes many partitions sets this to collect their groups, and scores each of them once at its end.
local stale_groups = nil

local function group_changed(lane, group)
  if stale_groups then stale_groups[group .. '\31' .. lane] = { lane, group } else rescore_group(lane, group) end
end

local function rescore_stale_groups()
  for _, stale in pairs(stale_groups) do rescore_group(stale[1], stale[2]) end
  stale_groups = {}
end

-- `found_in`: the group in whose index a claim has found the partition, if not the one that is noted in it.
local function rescore(lane, p, found_in)
  local rule = redis.call('HMGET', k_partition(lane, p), 'paused_until', 'cap', 'circuit_opened_at', 'tat', 'slack',
    'served', 'succeeded_at', 'failures', 'owner', 'group')
  local proven = rule[7] and wall_ms() - tonumber(rule[7]) < PROVEN_FOR_MS
    and (tonumber(rule[8]) or 0) < PROVEN_FAILURES
  local cap = tonumber(rule[2])
  if rule[3] or not proven then cap = 1 end
  local claimable = nil
  local leased = redis.call('ZRANGE', k_leased(lane, p), 0, 0, 'WITHSCORES')
  if not leased[1] or not cap or redis.call('ZCOUNT', k_leased(lane, p), 'inf', 'inf') < cap then
    local head = redis.call('ZRANGE', k_waiting(lane, p), 0, 0, 'WITHSCORES')
    claimable = earliest(tonumber(head[2]), leased[2] ~= 'inf' and tonumber(leased[2]) or nil)
  end

  local group = (proven and 'proven:' or 'unproven:') .. (rule[9] or '')
  local former = found_in or rule[10]
  if former and former ~= group then
    redis.call('ZREM', k_group(lane, former), p)
    group_changed(lane, former)
  end
  if claimable then
    local paced = rule[4] and rule[5] and math.ceil(tonumber(rule[4]) - tonumber(rule[5])) or 0
    local paused_until = tonumber(rule[1]) or 0
    local score = math.max(claimable, paused_until, paced, tonumber(rule[6]) or 0)
    redis.call('ZADD', k_group(lane, group), score, p)
    if rule[10] ~= group then redis.call('HSET', k_partition(lane, p), 'group', group) end
  else
    redis.call('ZREM', k_group(lane, group), p)
  end
  group_changed(lane, group)
end

local function lease_of(lane, p, item)
  local value = redis.call('HGET', k_leases(lane, p), item)
  if not value then return nil end
  local token, deaths, put_again = string.match(value, '^([^|]+)|(%d+)|(.*)$')
  return { token = token, deaths = tonumber(deaths), put_again = tonumber(put_again) }
end

local function write_lease(lane, p, item, lease)
  local put_again = lease.put_again and string.format('%.0f', lease.put_again) or ''
  redis.call('HSET', k_leases(lane, p), item, lease.token .. '|' .. lease.deaths .. '|' .. put_again)
end

local function forget(lane, p, item)
  redis.call('ZREM', k_waiting(lane, p), item)
  redis.call('ZREM', k_leased(lane, p), item)
  redis.call('HDEL', k_leases(lane, p), item)
end

-- Make a leased item due now, without an outcome.
local function give_back(lane, p, item)
  forget(lane, p, item)
  redis.call('ZADD', k_waiting(lane, p), now_ms(), item)
end

-- Call visit(lane, p, item, lease) for every lease that a process has, then rescore its partitions. Those in which it has
-- none any more leave its set, so that the set has the size of what the process holds.
local function each_lease_of(process, visit)
  for _, entry in ipairs(redis.call('SMEMBERS', k_held(process))) do
    local lane, p = string.match(entry, '^([^\31]*)\31(.*)$')
    local some = false
    for _, item in ipairs(redis.call('HKEYS', k_leases(lane, p))) do
      local lease = lease_of(lane, p, item)
      if string.sub(lease.token, 1, #process + 1) == process .. ':' then
        some = true
        visit(lane, p, item, lease)
      end
    end
    if some then rescore(lane, p) else redis.call('SREM', k_held(process), entry) end
  end
end

-- Make an item due. While it is leased, only note the due in the lease: the holder's settle makes it due again, so an
-- update that arrives during a lease is never lost. `mode` is 'LT' (due at the earlier of both) or 'NX' (an item that is
-- there, waiting or leased, is left as it is).
local function put(lane, p, item, due, mode)
  local lease = lease_of(lane, p, item)
  if lease then
    if mode == 'NX' then return end
    if not lease.put_again or due < lease.put_again then
      lease.put_again = due
      write_lease(lane, p, item, lease)
    end
    return
  end
  redis.call('ZADD', k_waiting(lane, p), mode, due, item)
  rescore(lane, p)
end
