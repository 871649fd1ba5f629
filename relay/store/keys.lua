-- Key names of the store that several scripts build; the queue's own are in lane.lua.

local function k_pending(sub, ordering_key) return 'relay:pending:' .. sub .. ':' .. ordering_key end
