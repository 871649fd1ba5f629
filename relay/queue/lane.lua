-- What every script that touches a lane shares: key names, gates, put. Loaded in front of the others.
--
-- A lane is an index of partitions; a partition holds waiting items (a ZSET by due) and leased ones (a ZSET by the
-- lease's end, and a HASH with token|expiries|dirty). The index scores a partition by the earliest moment at which
-- something can be claimed from it: its earliest waiting item unless its cap is reached, its earliest lease to end,
-- not before its gate, and not faster than its pace. Every change of a partition ends with `rescore`, so a claim never
-- wades through partitions that may not run.
--
-- Partitions take turns: one that was served goes behind whatever became due before that, however long its own backlog
-- has been due. Otherwise a flood for some would be drained before anybody else's first item.
--
-- Time is the store's own (TIME): no clock of a process decides anything.

local function now_ms()
  local t = redis.call('TIME')
  return tonumber(t[1]) * 1000 + math.floor(tonumber(t[2]) / 1000)
end

-- The same with its fraction, by which turns are kept apart: whole milliseconds are dues.
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
local function k_pending(sub, subject) return 'relay:pending:' .. sub .. ':' .. subject end

local function rescore(lane, p)
  local rule = redis.call('HMGET', k_partition(lane, p), 'gate', 'cap', 'breaker', 'tat', 'slack', 'served')
  local held = redis.call('ZRANGE', k_leased(lane, p), 0, 0, 'WITHSCORES')
  local earliest = held[2] and tonumber(held[2])
  local cap = rule[3] and 1 or tonumber(rule[2])
  if not cap or not held[1] or redis.call('ZCARD', k_leased(lane, p)) < cap then
    local head = redis.call('ZRANGE', k_waiting(lane, p), 0, 0, 'WITHSCORES')
    local due = head[2] and tonumber(head[2])
    if due and (not earliest or due < earliest) then earliest = due end
  end
  if not earliest then
    redis.call('ZREM', k_index(lane), p)
  elseif rule[1] == 'inf' then
    redis.call('ZADD', k_index(lane), '+inf', p)
  else
    local gate = tonumber(rule[1]) or 0
    local pace = rule[4] and rule[5] and math.ceil(tonumber(rule[4]) - tonumber(rule[5])) or 0
    local served = tonumber(rule[6]) or 0
    if served > now_ms() + 1 then served = 0 end -- the clock stepped back
    redis.call('ZADD', k_index(lane), math.max(earliest, gate, pace, served), p)
  end
end

local function lease_of(lane, p, item)
  local value = redis.call('HGET', k_leases(lane, p), item)
  if not value then return nil end
  local token, expiries, dirty = string.match(value, '^(%d+)|(%d+)|(.*)$')
  return { token = token, expiries = tonumber(expiries), dirty = tonumber(dirty) }
end

local function write_lease(lane, p, item, lease)
  local dirty = lease.dirty and string.format('%.0f', lease.dirty) or ''
  redis.call('HSET', k_leases(lane, p), item, lease.token .. '|' .. lease.expiries .. '|' .. dirty)
end

local function forget(lane, p, item)
  redis.call('ZREM', k_waiting(lane, p), item)
  redis.call('ZREM', k_leased(lane, p), item)
  redis.call('HDEL', k_leases(lane, p), item)
end

-- Make an item due. While somebody holds it, only note that it is wanted again: the holder's settle re-arms it, so an
-- update that arrives during a lease is never lost. `mode` is 'LT' (due at the earlier of both) or 'NX' (what stands
-- is kept, waiting or held: the subject of a delivery, whose settle looks for more pending events by itself).
local function put(lane, p, item, due, mode)
  local lease = lease_of(lane, p, item)
  if lease then
    if mode == 'NX' then return end
    if not lease.dirty or due < lease.dirty then
      lease.dirty = due
      write_lease(lane, p, item, lease)
    end
    return
  end
  redis.call('ZADD', k_waiting(lane, p), mode, due, item)
  rescore(lane, p)
end
