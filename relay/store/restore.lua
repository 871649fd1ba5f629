-- Put back into a lane those items that it has lost.
--
-- KEYS   none
-- ARGV   lane, partition ('' in the poll lane, where each item has its own), then the items
-- REPLY  how many the lane had lost
--
-- Races closed here:
-- * An item is settled, erased or removed after the caller has read that it is owed: in the deliver, enrich and record
--   lanes it is not owed any more in this step. Polls have no such list: every configured source is owed one.
-- * The place of a leased item is lost while its holder works: the lease goes on for as long as that process lives.

local lane, partition = ARGV[1], ARGV[2]
local kind = lane == 'deliver' and 'subscription' or 'source'
local now = now_ms()
local restored = 0

local function is_owed(p, item)
  if lane == 'poll' then return not is_removed(kind, item) end
  return redis.call('ZSCORE', k_owed_items(lane, p), item)
end

local function restore(p, item)
  if redis.call('ZSCORE', k_waiting(lane, p), item) or redis.call('ZSCORE', k_leased(lane, p), item) then return end
  if not is_owed(p, item) then return end
  local lease = lease_of(lane, p, item)
  if not lease then
    redis.call('ZADD', k_waiting(lane, p), now, item)
  else
    local holder = string.match(lease.token, '^[^:]+')
    redis.call('ZADD', k_leased(lane, p), redis.call('ZSCORE', 'relay:processes', holder) and 'inf' or now, item)
  end
  restored = restored + 1
end

if lane ~= 'poll' and is_removed(kind, partition) then return 0 end
for n = 3, #ARGV do
  local p = lane == 'poll' and ARGV[n] or partition
  restore(p, ARGV[n])
  rescore(lane, p) -- the partition's place in the index may be lost too
end
if #ARGV == 2 then rescore(lane, partition) end
return restored
