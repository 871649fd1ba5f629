-- Create, replace or remove one declaration, if the stored value is the one that was read.
--
-- KEYS   none
-- ARGV   kind, id, expected ('*' any, '' none, else the very value), new value ('' to remove)
-- REPLY  1 done · 0 the stored value is another one, nothing was done
--
-- Races closed here:
-- * Two tenants create the same id at the same time: one of them succeeds, the other finds the id taken.
-- * Two people change the same declaration: the second finds another value, reads again and changes that.
-- * A process that has not read of a removal yet works on: the tombstone is written with the removal, and ends that.
-- Only a change raises the version that all processes watch.

local kind, id, expected, fresh = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local k_declared = 'relay:declared:' .. kind
local stored = redis.call('HGET', k_declared, id) or ''
if expected ~= '*' and stored ~= expected then return 0 end
if fresh ~= '' then
  redis.call('HSET', k_declared, id, fresh)
elseif stored ~= '' then
  redis.call('HDEL', k_declared, id)
else
  return 0
end
redis.call('INCR', 'relay:declared-version')
if fresh ~= '' then
  redis.call('HDEL', k_removed(kind), id)
elseif kind ~= 'token' and redis.call('SISMEMBER', k_configured(kind), id) == 0 then
  redis.call('HSET', k_removed(kind), id, string.format('%.0f', now_ms()))
end
return 1
