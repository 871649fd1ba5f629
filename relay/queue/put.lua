-- Make items due, set or lift a gate, set a cap.
--
-- KEYS   none
-- ARGV   n, then n × (verb, lane, partition, a, b)
--        put   a = item, b = wait ms: due that much from now, or earlier where that stands
--        new   a = item, b = wait ms: only if the lane does not have the item
--        drop  a = item: forget it
--        gate  a = ms or 'inf', '' = open: nothing is claimed from the partition before
--        cap   a = most items in flight
--        pace  a = ms between two claims ('' = any), b = ms that claims may be ahead of that (a small burst)
--        off   a = why nothing is queued or claimed ('' = it is again, and its health is forgotten)
--        back  a = '', b = ms by which the store's clock was set back: all of the lane moves with it
--        lapse a = '', b = 0: every lease of the lane ends now, because whoever holds one is known to be dead
-- ANSWER now_ms
--
-- Races closed here:
-- * a gate is set while a claim looks at the partition: both rescore the index in one step, so no claim after this one
--   sees the old gate.
-- * several processes see the clock go back: the first moves the lane, for the others within a minute it is done. What
--   was put after the step and before the move becomes due early; leases given in between are short, and stay.

local now = now_ms()

local function move_back(lane, by)
  if not redis.call('SET', 'relay:clock:' .. lane, string.format('%.0f', by), 'NX', 'PX', 60000) then return end
  for _, p in ipairs(redis.call('ZRANGE', k_index(lane), 0, -1)) do
    for name, after in pairs({ [k_waiting(lane, p)] = now, [k_leased(lane, p)] = now + 300000 }) do
      local ahead = redis.call('ZRANGEBYSCORE', name, '(' .. string.format('%.0f', after), '+inf', 'WITHSCORES')
      for n = 1, #ahead, 2 do redis.call('ZINCRBY', name, -by, ahead[n]) end
    end
    local gate = tonumber(redis.call('HGET', k_partition(lane, p), 'gate'))
    if gate and gate > now and gate < math.huge then redis.call('HSET', k_partition(lane, p), 'gate', gate - by) end
    redis.call('HDEL', k_partition(lane, p), 'tat')
    rescore(lane, p)
  end
end

local function lapse(lane)
  for _, p in ipairs(redis.call('ZRANGE', k_index(lane), 0, -1)) do
    for _, item in ipairs(redis.call('ZRANGE', k_leased(lane, p), 0, -1)) do
      redis.call('ZADD', k_leased(lane, p), now, item)
    end
    rescore(lane, p)
  end
end

local i = 2
for _ = 1, tonumber(ARGV[1]) do
  local verb, lane, p, a, b = ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 3], tonumber(ARGV[i + 4])
  i = i + 5
  if verb == 'put' or verb == 'new' then
    put(lane, p, a, now + b, verb == 'put' and 'LT' or 'NX')
  elseif verb == 'drop' then
    forget(lane, p, a)
    rescore(lane, p)
  elseif verb == 'gate' then
    if a == '' then redis.call('HDEL', k_partition(lane, p), 'gate') else redis.call('HSET', k_partition(lane, p), 'gate', a) end
    rescore(lane, p)
  elseif verb == 'cap' then
    redis.call('HSET', k_partition(lane, p), 'cap', a)
    rescore(lane, p)
  elseif verb == 'pace' then
    if a == '' then
      redis.call('HDEL', k_partition(lane, p), 'interval', 'slack', 'tat')
    else
      redis.call('HSET', k_partition(lane, p), 'interval', a, 'slack', b)
    end
    rescore(lane, p)
  elseif verb == 'off' then
    if a == '' then
      redis.call('HDEL', k_partition(lane, p), 'off', 'gate', 'breaker', 'unwell', 'failing_since', 'opened', 'opens')
    else
      redis.call('HSET', k_partition(lane, p), 'off', a, 'gate', 'inf')
    end
    rescore(lane, p)
  elseif verb == 'back' then
    move_back(lane, b)
  elseif verb == 'lapse' then
    lapse(lane)
  end
end
return now
