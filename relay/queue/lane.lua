-- What every script that touches a lane shares: key names, leases, put. Loaded in front of the others.
--
-- A lane is an index of partitions; a partition has waiting items (a ZSET by due) and leased ones (a ZSET by the end of
-- the lease, and a HASH with token|expiries|due of a put during the lease). The index scores a partition by the earliest
-- moment at which something can be claimed from it: its earliest waiting item unless its limit in flight is reached, its
-- earliest lease to end; not while it is paused, and not faster than its rate. Every change of a partition ends with
-- `rescore`, so a claim never scans partitions from which nothing may be claimed.
--
-- Partitions take turns: one that was served is scored behind those that became due before that, however long its own
-- backlog has been due. Otherwise a flood in some would be drained before the first item of any other.
--
-- Time is the store's own (TIME): no clock of a process decides anything.

local function now_ms()
  local t = redis.call('TIME')
  return tonumber(t[1]) * 1000 + math.floor(tonumber(t[2]) / 1000)
end

-- The same with its fraction, which keeps turns apart: whole milliseconds are dues.
local function moment_ms()
  local t = redis.call('TIME')
  return string.format('%.3f', tonumber(t[1]) * 1000 + tonumber(t[2]) / 1000)
end

local function k_index(lane) return 'relay:lane:' .. lane end
local function k_waiting(lane, p) return 'relay:lane:' .. lane .. ':' .. p end
local function k_leased(lane, p) return 'relay:leased:' .. lane .. ':' .. p end
local function k_leases(lane, p) return 'relay:leases:' .. lane .. ':' .. p end
local function k_partition(lane, p) return 'relay:partition:' .. lane .. ':' .. p end
local function k_quarantine(lane) return 'relay:quarantined:' .. lane end

-- What a lane does beside the queue's own work; exchange.lua describes the functions and has defaults for them.
local hooks = {}

local function earliest(a, b)
  if a and b then return math.min(a, b) end
  return a or b
end

local function rescore(lane, p)
  local rule = redis.call('HMGET', k_partition(lane, p), 'paused_until', 'cap', 'circuit_opened_at', 'tat', 'slack',
    'served')
  local leased = redis.call('ZRANGE', k_leased(lane, p), 0, 0, 'WITHSCORES')
  local claimable = leased[2] and tonumber(leased[2])
  local cap = rule[3] and 1 or tonumber(rule[2])
  if not cap or not leased[1] or redis.call('ZCARD', k_leased(lane, p)) < cap then
    local head = redis.call('ZRANGE', k_waiting(lane, p), 0, 0, 'WITHSCORES')
    claimable = earliest(claimable, head[2] and tonumber(head[2]))
  end
  if not claimable then
    redis.call('ZREM', k_index(lane), p)
  elseif rule[1] == 'inf' then
    redis.call('ZADD', k_index(lane), '+inf', p)
  else
    local paused_until = tonumber(rule[1]) or 0
    local paced = rule[4] and rule[5] and math.ceil(tonumber(rule[4]) - tonumber(rule[5])) or 0
    local served = tonumber(rule[6]) or 0
    if served > now_ms() + 1 then served = 0 end -- the clock stepped back
    redis.call('ZADD', k_index(lane), math.max(claimable, paused_until, paced, served), p)
  end
end

local function lease_of(lane, p, item)
  local value = redis.call('HGET', k_leases(lane, p), item)
  if not value then return nil end
  local token, expiries, put_again = string.match(value, '^(%d+)|(%d+)|(.*)$')
  return { token = token, expiries = tonumber(expiries), put_again = tonumber(put_again) }
end

local function write_lease(lane, p, item, lease)
  local put_again = lease.put_again and string.format('%.0f', lease.put_again) or ''
  redis.call('HSET', k_leases(lane, p), item, lease.token .. '|' .. lease.expiries .. '|' .. put_again)
end

local function forget(lane, p, item)
  redis.call('ZREM', k_waiting(lane, p), item)
  redis.call('ZREM', k_leased(lane, p), item)
  redis.call('HDEL', k_leases(lane, p), item)
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
