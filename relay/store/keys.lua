-- What several scripts of the store share: key names (the queue's own are in lane.lua), and what is owed.

local function k_pending(sub, ordering_key) return 'relay:pending:' .. sub .. ':' .. ordering_key end
local K_CONFIGURATIONS = 'relay:configurations'
local function k_configuration(version) return 'relay:configuration:' .. version end
local function k_configured(kind) return 'relay:configured:' .. kind end
local OPERATOR = '@'
local function k_owners(kind) return 'relay:owners:' .. kind end
local function k_removed(kind) return 'relay:removed:' .. kind end
local function k_owed(lane) return 'relay:owed:' .. lane end
local function k_owed_items(lane, p) return 'relay:owed:' .. lane .. ':' .. p end

-- An item is owed from the step that makes it due to the step that settles it for good, whatever becomes of it in the
-- lane: the sweep puts back what the lane has lost (restore.lua), so that a lost item is a delay and no loss.
local function owe(lane, p, item, due, mode)
  redis.call('ZADD', k_owed_items(lane, p), 'NX', due, item)
  redis.call('SADD', k_owed(lane), p)
  put(lane, p, item, due, mode)
end

local function settle_owed(lane, p, item)
  redis.call('ZREM', k_owed_items(lane, p), item)
  if redis.call('EXISTS', k_owed_items(lane, p)) == 0 then redis.call('SREM', k_owed(lane), p) end
end

local function is_removed(kind, id) return redis.call('HEXISTS', k_removed(kind), id) == 1 end
