-- Say that a process lives, end the leases of those that died, and note leaps of the clock.
--
-- KEYS   none
-- ARGV   process, ms since its last heartbeat on its own clock or '' for its first,
--        ms without a heartbeat after which a process is dead (0: all others are known to be dead),
--        ms by which TIME has stepped since then, as the process's own clock has it
-- REPLY  { now_ms, wall_ms, dead process, … }
--
-- A lease that ends counts against its item, which may have killed the process. When the process held a suspect (an item
-- with which three had died before), only the suspect is counted.
--
-- Scheduling follows a leap forward, but nothing is deleted by its age until TIME steps back or for 7 days: it
-- may be wrong. After a pause of the whole relay of more than a day nobody can say, so that nothing is deleted for a day.
--
-- Races closed here:
-- * the store was unavailable, or its clock leapt forward: everybody's last heartbeat is old. A process that has just
--   missed its own declares no other dead, so the others have a second to come back.
-- * a process that was declared dead lives (it was suspended): its next heartbeat adds it again; what it settles is
--   accepted for items that no other has claimed meanwhile.

local process, elapsed, dead_after = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local stepped, now, wall = tonumber(ARGV[4]), now_ms(), wall_ms()
local DAY_MS, LEAP_MS = 86400000, 60000

local function suspend_deletion(leap, days)
  if redis.call('HSETNX', 'relay:clock', 'leapt_by', string.format('%.0f', leap)) == 1 then
    redis.call('HSET', 'relay:clock', 'suspended_until', string.format('%.0f', wall + days * DAY_MS))
  end
end

local state = redis.call('HMGET', 'relay:clock', 'seen_at', 'leapt_by', 'suspended_until')
local seen_at, leapt_by, suspended_until = tonumber(state[1]), tonumber(state[2]), tonumber(state[3])
if leapt_by and (stepped < -leapt_by / 2 or wall > suspended_until or (seen_at and wall - seen_at < -leapt_by / 2)) then
  redis.call('HDEL', 'relay:clock', 'leapt_by', 'suspended_until')
end
if stepped > LEAP_MS then
  suspend_deletion(stepped, 7)
elseif not elapsed and seen_at and wall - seen_at > DAY_MS then
  suspend_deletion(wall - seen_at, 1)
end
redis.call('HSET', 'relay:clock', 'seen_at', string.format('%.0f', wall))

local last = tonumber(redis.call('ZSCORE', 'relay:processes', process))
redis.call('ZADD', 'relay:processes', now, process)
local reply = { now, wall }
local punctual = elapsed and last and elapsed < dead_after / 2 and now - last < dead_after / 2
if dead_after > 0 and not punctual then return reply end

local silent = redis.call('ZRANGEBYSCORE', 'relay:processes', '-inf', now - dead_after, 'LIMIT', 0, 10)
for _, other in ipairs(silent) do
  if other ~= process then
    local suspects = false
    each_lease_of(other, function(_, _, _, lease) suspects = suspects or lease.deaths >= 3 end)
    each_lease_of(other, function(lane, p, item, lease)
      if suspects and lease.deaths < 3 then
        give_back(lane, p, item)
      else
        redis.call('ZADD', k_leased(lane, p), now, item)
      end
    end)
    redis.call('ZREM', 'relay:processes', other)
    redis.call('DEL', k_held(other))
    reply[#reply + 1] = other
  end
end
return reply
