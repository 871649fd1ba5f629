-- Put and drop items, limit, pause, disable and enable partitions.
--
-- KEYS   none
-- ARGV   lane, n, then n × (verb, partition, value, ms)
--        put                value = item: due ms from now, or earlier where that stands
--        put_new            value = item: due ms from now, only if the lane does not have it
--        drop               value = item: forget it
--        limit_in_flight    value = most items leased at once
--        limit_rate         value = ms between two claims ('' = any), ms that claims may be ahead of that (a small burst)
--        pause              value = ms or 'inf', '' = not paused: nothing is claimed from the partition before
--        disable            value = the reason: nothing is claimed
--        enable             claimed again, and its health forgotten
--        follow_clock_back  ms by which the store's clock was set back: all of the lane moves with it
--        expire_leases      every lease of the lane ends now, because its former holders are known to be dead
-- REPLY  now_ms
--
-- Races closed here:
-- * a partition is paused while a claim scans it: both rescore the index in one step, so no claim after this one claims
--   from it.
-- * several processes see the clock go back: the first moves the lane, for the others within a minute it is done. What
--   was put after the step and before the move becomes due early; leases granted in between are short, and stay.

local lane = ARGV[1]
local now = now_ms()

local function follow_clock_back(by)
  if not redis.call('SET', 'relay:clock:' .. lane, string.format('%.0f', by), 'NX', 'PX', 60000) then return end
  for _, p in ipairs(redis.call('ZRANGE', k_index(lane), 0, -1)) do
    for name, after in pairs({ [k_waiting(lane, p)] = now, [k_leased(lane, p)] = now + 300000 }) do
      local ahead = redis.call('ZRANGEBYSCORE', name, '(' .. string.format('%.0f', after), '+inf', 'WITHSCORES')
      for n = 1, #ahead, 2 do redis.call('ZINCRBY', name, -by, ahead[n]) end
    end
    local paused_until = tonumber(redis.call('HGET', k_partition(lane, p), 'paused_until'))
    if paused_until and paused_until > now and paused_until < math.huge then
      redis.call('HSET', k_partition(lane, p), 'paused_until', paused_until - by)
    end
    redis.call('HDEL', k_partition(lane, p), 'tat')
    rescore(lane, p)
  end
end

local function expire_leases()
  for _, p in ipairs(redis.call('ZRANGE', k_index(lane), 0, -1)) do
    for _, item in ipairs(redis.call('ZRANGE', k_leased(lane, p), 0, -1)) do
      redis.call('ZADD', k_leased(lane, p), now, item)
    end
    rescore(lane, p)
  end
end

for i = 3, 2 + 4 * tonumber(ARGV[2]), 4 do
  local verb, p, value, ms = ARGV[i], ARGV[i + 1], ARGV[i + 2], tonumber(ARGV[i + 3])
  local name = k_partition(lane, p)
  if verb == 'put' then
    put(lane, p, value, now + ms, 'LT')
  elseif verb == 'put_new' then
    put(lane, p, value, now + ms, 'NX')
  elseif verb == 'follow_clock_back' then
    follow_clock_back(ms)
  elseif verb == 'expire_leases' then
    expire_leases()
  else
    if verb == 'drop' then
      forget(lane, p, value)
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
      redis.call('HDEL', name, 'disabled', 'paused_until', 'unhealthy_in_a_row', 'failing_since', 'circuit_opened_at',
        'circuit_openings')
    end
    rescore(lane, p)
  end
end
return now
