-- Create, replace or remove one declaration, if the stored value is the one that was read.
--
-- KEYS   none
-- ARGV   kind, id, expected ('*' any, '' none, else the very value), new value ('' to remove), then perhaps its owner
--        (a tenant, or '@' for the operator)
-- REPLY  1 done · 0 the stored value is another one, nothing was done · -1 the id has data of another owner
--
-- Races closed here:
-- * Two tenants create the same id at the same time: one of them succeeds, the other finds the id taken.
-- * Two people change the same declaration: the second finds another value, reads again and changes that.
-- * An id that was removed, from the configuration too, is created again by another owner while it has calls, events or
--   deliveries: it is refused in the step that would create it. Data without a known owner is the operator's.
-- * A process that has not read of a removal yet works on: the tombstone is written with the removal, and ends that.
-- Only a change raises the version that all processes watch.

local function has_data(kind, id)
  if kind == 'source' then
    return redis.call('EXISTS', 'relay:source:' .. id, 'relay:calls:' .. id, 'relay:events:' .. id) > 0
  end
  return redis.call('EXISTS', 'relay:deliveries-of:' .. id, k_waiting('deliver', id), k_leased('deliver', id),
    k_owed_items('deliver', id)) > 0
end

local kind, id, expected, fresh, owner = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local k_declared = 'relay:declared:' .. kind
local stored = redis.call('HGET', k_declared, id) or ''
if expected ~= '*' and stored ~= expected then return 0 end
if fresh ~= '' then
  if owner then
    if (redis.call('HGET', k_owners(kind), id) or OPERATOR) ~= owner and has_data(kind, id) then return -1 end
    redis.call('HSET', k_owners(kind), id, owner)
  end
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
