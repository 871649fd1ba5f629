-- Acquire, renew or release leases on sources' streams: one process a source, over all pollers.
--
-- KEYS   one a source (STR: the holder; its TTL is the lease)
-- ARGV   holder, lease ms (0: release what is ours)
-- REPLY  1 or 0 a key: ours from now on, or another holder's
--
-- Race closed here: two pollers find a source without a holder; one of them gets it. One whose lease has ended keeps
-- nothing: the key is gone, or it is another's.

local replies = {}
for n, key in ipairs(KEYS) do
  local holder = redis.call('GET', key)
  local ours = not holder or holder == ARGV[1]
  if ours and ARGV[2] == '0' then
    redis.call('DEL', key)
  elseif ours then
    redis.call('SET', key, ARGV[1], 'PX', ARGV[2])
  end
  replies[n] = ours and 1 or 0
end
return replies
