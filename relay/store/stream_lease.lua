-- Take, keep or give up the right to listen to sources: one process a source, over all pollers.
--
-- KEYS   one a source (STR: who listens; its TTL is how long that holds)
-- ARGV   who asks, lease ms (0: give up what is ours)
-- REPLY  1 or 0 a key: ours from now on, or somebody else's
--
-- Race closed here: two pollers find a source without a listener; one of them gets it. One whose lease has ended keeps
-- nothing: the key is gone, or it is another's.

local answers = {}
for n, key in ipairs(KEYS) do
  local holder = redis.call('GET', key)
  local ours = not holder or holder == ARGV[1]
  if ours and ARGV[2] == '0' then
    redis.call('DEL', key)
  elseif ours then
    redis.call('SET', key, ARGV[1], 'PX', ARGV[2])
  end
  answers[n] = ours and 1 or 0
end
return answers
