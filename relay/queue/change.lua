-- Put and drop items; own, limit, pause, disable and enable partitions.
--
-- KEYS   none
-- ARGV   lane, n, then n × (verb, partition, value, ms)
--        put                value = item: due ms from now, or earlier where that stands
--        put_new            value = item: due ms from now, only if the lane does not have it
--        drop               value = item: forget it
--        own                value = the owner, '' for the operator: whose share of a lane the partition uses
--        limit_in_flight    value = most items leased at once
--        limit_rate         value = ms between two claims ('' = any), ms that claims may be ahead of that (a small burst)
--        pause              value = ms or 'inf', '' = not paused: nothing is claimed from the partition before
--        disable            value = the reason: nothing is claimed
--        enable             claimed again, and its health forgotten
-- REPLY  { now_ms, wall_ms }
--
-- Race closed here: a partition is paused while a claim scans it: both rescore the index in one step, so no claim after
-- this one claims from it.

local lane = ARGV[1]
local now = now_ms()

for i = 3, 2 + 4 * tonumber(ARGV[2]), 4 do
  local verb, p, value, ms = ARGV[i], ARGV[i + 1], ARGV[i + 2], tonumber(ARGV[i + 3])
  local name = k_partition(lane, p)
  if verb == 'put' then
    put(lane, p, value, now + ms, 'LT')
  elseif verb == 'put_new' then
    put(lane, p, value, now + ms, 'NX')
  else
    if verb == 'drop' then
      forget(lane, p, value)
    elseif verb == 'own' then
      redis.call('HSET', name, 'owner', value)
    elseif verb == 'limit_in_flight' then
      redis.call('HSET', name, 'cap', value)
    elseif verb == 'limit_rate' and value == '' then
      redis.call('HDEL', name, 'interval', 'slack', 'tat')
    elseif verb == 'limit_rate' then
      redis.call('HSET', name, 'interval', value, 'slack', ms)
    elseif verb == 'pause' and value == '' then
      redis.call('HDEL', name, 'paused_until')
    elseif verb == 'pause' then
      redis.call('HSET', name, 'paused_until', value)
    elseif verb == 'disable' then
      redis.call('HSET', name, 'disabled', value, 'paused_until', 'inf')
    elseif verb == 'enable' then
      redis.call('HDEL', name, 'disabled', 'paused_until', 'failures', 'unhealthy_in_a_row', 'failing_since',
        'circuit_opened_at', 'circuit_openings')
    end
    rescore(lane, p)
  end
end
return { now, wall_ms() }
