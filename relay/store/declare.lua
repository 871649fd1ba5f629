-- Make, replace or remove one thing of those made at run time, if what stands there is what was read.
--
-- KEYS   none
-- ARGV   kind, id, expected ('*' whatever stands, '' nothing, else the very value), new value ('' to remove)
-- REPLY  1 done · 0 something else stands, nothing was done
--
-- Races closed here:
-- * two tenants make the same id at the same time: one of them is first, the other is told that it is taken.
-- * two people change the same thing: the second finds another value, reads again and changes that.
-- Only a change raises the number that all processes watch.

local kind, id, expected, fresh = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local k_declared = 'relay:declared:' .. kind
local stands = redis.call('HGET', k_declared, id) or ''
if expected ~= '*' and stands ~= expected then return 0 end
if fresh ~= '' then
  redis.call('HSET', k_declared, id, fresh)
elseif stands ~= '' then
  redis.call('HDEL', k_declared, id)
else
  return 0
end
redis.call('INCR', 'relay:declared-version')
return 1
