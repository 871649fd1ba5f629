-- Say that a process lives, and end the leases of those that died.
--
-- KEYS   none
-- ARGV   process, ms since its last heartbeat on its own clock or '' for its first,
--        ms without a heartbeat after which a process is dead (0: all others are known to be dead)
-- REPLY  { now_ms, wall_ms, dead process, … }
--
-- A lease that ends counts against its item, which may have killed the process. When the process held a suspect (an item
-- with which three had died before), only the suspect is counted.
--
-- Races closed here:
-- * the store was unavailable, or its clock leapt forward: everybody's last heartbeat is old. A process that has just
--   missed its own declares no other dead, so the others have a second to come back.
-- * a process that was declared dead lives (it was suspended): its next heartbeat adds it again; what it settles is
--   accepted for items that no other has claimed meanwhile.

local process, elapsed, dead_after = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local now = now_ms()
local last = tonumber(redis.call('ZSCORE', 'relay:processes', process))
redis.call('ZADD', 'relay:processes', now, process)
local reply = { now, wall_ms() }
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
