-- Put back into a lane those items of one partition that it has lost.
--
-- KEYS   none
-- ARGV   lane, partition, ms for which a lease without an end still holds, then the items
-- REPLY  how many the lane had lost
--
-- Races closed here:
-- * An item is settled, erased or removed after the caller has read that it is owed: in the deliver, enrich and record
--   lanes it is not owed any more in this step. Polls have no such list: every configured source is owed one.
-- * The end of a lease is lost while its holder works: the lease goes on for a while, in which the holder settles.

local lane, p, lease_ms = ARGV[1], ARGV[2], tonumber(ARGV[3])
local kind = lane == 'deliver' and 'subscription' or 'source'
local now = now_ms()
local restored = 0
if lane ~= 'poll' and is_removed(kind, p) then return 0 end
for n = 4, #ARGV do
  local item = ARGV[n]
  local owed = lane == 'poll' and not is_removed(kind, item) or redis.call('ZSCORE', k_owed_items(lane, p), item)
  if owed and not redis.call('ZSCORE', k_waiting(lane, p), item)
    and not redis.call('ZSCORE', k_leased(lane, p), item) then
    if lease_of(lane, p, item) then
      redis.call('ZADD', k_leased(lane, p), now + lease_ms, item)
    else
      redis.call('ZADD', k_waiting(lane, p), now, item)
    end
    restored = restored + 1
  end
end
rescore(lane, p) -- the partition's place in the index may be lost too
return restored
