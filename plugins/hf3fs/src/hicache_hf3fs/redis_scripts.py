"""The Lua scripts of the Redis metadata; KEYS[1] is the base of all names.

Generations are 62-bit numbers: they stay text here, since Lua would round them.
"""

from __future__ import annotations

_COMMON = """
local base = KEYS[1]
local BIND, SLABS, FRESH = base .. 'bind', base .. 'slabs', base .. 'fresh'
local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1e6
local function text(seconds) return string.format('%.6f', seconds) end
local function unpack_binding(value)
    local slab, number, gen, nbytes, till = string.match(value, '^(.-)|(.-)|(.-)|(.-)|(.-)$')
    return {slab = slab, number = number, gen = gen, nbytes = nbytes, till = tonumber(till)}
end
local function pack_binding(b)
    return table.concat({b.slab, b.number, b.gen, b.nbytes, text(b.till)}, '|')
end
local function bound(key)
    local value = redis.call('HGET', BIND, key)
    return value and unpack_binding(value)
end
-- The key is gone; the slot is free as soon as the last lease on it has ended.
local function unbind(key, b)
    redis.call('HDEL', BIND, key)
    redis.call('ZREM', base .. 'lru:' .. b.slab, key)
    redis.call('ZADD', base .. 'held:' .. b.slab, text(b.till), b.number)
end
"""

_LOOKUP = """
local lease, answers = tonumber(ARGV[1]), {}
for i = 2, #ARGV do
    local value = redis.call('HGET', BIND, ARGV[i])
    answers[i - 1] = value
    if value then
        local b = unpack_binding(value)
        if b.till < now + lease then
            b.till = now + 2 * lease
            local leased = redis.pcall('HSET', BIND, ARGV[i], pack_binding(b))
            if type(leased) == 'table' then
                answers[i - 1] = false  -- no memory for it: without a lease it cannot be read
            else
                redis.call('ZADD', base .. 'lru:' .. b.slab, text(now), ARGV[i])
            end
        end
    end
end
return answers
"""

_RESERVE = """
local slab, write_lease = ARGV[1], tonumber(ARGV[2])
local n_slots = tonumber(redis.call('HGET', SLABS, slab) or '')
if not n_slots then return redis.error_reply('UNKNOWNSLAB ' .. slab) end
local LRU, HELD, GEN = base .. 'lru:' .. slab, base .. 'held:' .. slab, base .. 'gen:' .. slab
local stored, need = {}, 0
for i = 3, #ARGV, 3 do
    local b = bound(ARGV[i])
    stored[i] = b and b.nbytes == ARGV[i + 1]
    if not stored[i] then need = need + 1 end
    -- Touched, so that making room for the others of this call cannot remove it.
    if b then redis.call('ZADD', base .. 'lru:' .. b.slab, text(now), ARGV[i]) end
end
local free = {}
if need > 0 then
    free = redis.call('ZRANGEBYSCORE', HELD, '-inf', text(now), 'LIMIT', 0, need)
end
local fresh = tonumber(redis.call('HGET', FRESH, slab) or '0')
while #free < need and fresh < n_slots do
    free[#free + 1] = string.format('%.0f', fresh)
    fresh = fresh + 1
end
redis.call('HSET', FRESH, slab, string.format('%.0f', fresh))
local skipped = 0
while #free < need do
    local oldest = redis.call('ZRANGEBYSCORE', LRU, '-inf', '(' .. text(now), 'LIMIT', skipped, 64)
    if #oldest == 0 then break end
    for _, key in ipairs(oldest) do
        local b = bound(key)
        if #free < need and b.till <= now then
            unbind(key, b)
            free[#free + 1] = b.number
        else
            skipped = skipped + 1
        end
    end
end
local answers, n = {}, 0
for i = 3, #ARGV, 3 do
    if stored[i] then
        answers[#answers + 1] = -1
    else
        n = n + 1
        if n > #free then break end
        answers[#answers + 1] = tonumber(free[n])
        redis.call('ZADD', HELD, text(now + write_lease), free[n])
        redis.call('HSET', GEN, free[n], ARGV[i + 2])
    end
end
return answers
"""

_PUBLISH = """
local answers = {}
for i = 1, #ARGV, 5 do
    local key, nbytes, slab, number, gen = unpack(ARGV, i, i + 4)
    local HELD, GEN = base .. 'held:' .. slab, base .. 'gen:' .. slab
    if redis.call('HGET', GEN, number) ~= gen then
        answers[#answers + 1] = 0
    else
        answers[#answers + 1] = 1
        redis.call('HDEL', GEN, number)
        local other = bound(key)
        if other and other.nbytes == nbytes then  -- somebody was faster; nobody has seen ours
            redis.call('ZADD', HELD, 0, number)
        else
            if other then unbind(key, other) end
            redis.call('ZREM', HELD, number)
            local b = {slab = slab, number = number, gen = gen, nbytes = nbytes, till = 0}
            redis.call('HSET', BIND, key, pack_binding(b))
            -- Of objects that came in one call the last goes first: the others are of use alone.
            redis.call('ZADD', base .. 'lru:' .. slab, text(now - i * 1e-6), key)
        end
    end
end
return answers
"""

_RELEASE = """
for i = 1, #ARGV, 3 do
    local slab, number, gen = ARGV[i], ARGV[i + 1], ARGV[i + 2]
    if redis.call('HGET', base .. 'gen:' .. slab, number) == gen then
        redis.call('HDEL', base .. 'gen:' .. slab, number)
        redis.call('ZADD', base .. 'held:' .. slab, 0, number)
    end
end
"""

_DELETE = """
local n = 0
for i = 1, #ARGV, 2 do
    local b = bound(ARGV[i])
    if b and (ARGV[i + 1] == '' or ARGV[i + 1] == b.gen) then
        unbind(ARGV[i], b)
        n = n + 1
    end
end
return n
"""

_RESTORE = """
local slab = ARGV[1]
if redis.call('HEXISTS', SLABS, slab) == 1 then return 0 end
for i = 2, #ARGV, 4 do
    local number, gen, key, nbytes = unpack(ARGV, i, i + 3)
    local other = bound(key)
    if not other then
        local b = {slab = slab, number = number, gen = gen, nbytes = nbytes, till = 0}
        redis.call('HSET', BIND, key, pack_binding(b))
        redis.call('ZADD', base .. 'lru:' .. slab, text(now), key)
    elseif other.slab ~= slab or other.number ~= number then
        redis.call('ZADD', base .. 'held:' .. slab, 0, number)
    end
end
return 1
"""

_RESTORE_FREE = """
local slab = ARGV[1]
if redis.call('HEXISTS', SLABS, slab) == 1 then return 0 end
for i = 2, #ARGV do redis.call('ZADD', base .. 'held:' .. slab, 0, ARGV[i]) end
return 1
"""

_REGISTER = """
local slab, n_slots = ARGV[1], tonumber(ARGV[2])
local known = tonumber(redis.call('HGET', SLABS, slab) or '')
if not known then redis.call('HSET', FRESH, slab, ARGV[3]) end
if not known or known < n_slots then redis.call('HSET', SLABS, slab, ARGV[2]) end
"""

_TOTALS = """
local slab = ARGV[1]
return {
    tonumber(redis.call('HGET', SLABS, slab) or '0'),
    redis.call('ZCARD', base .. 'lru:' .. slab),
    redis.call('ZCOUNT', base .. 'held:' .. slab, '(' .. text(now), '+inf'),
}
"""

_CHECK = """
local slabs, n_bound = redis.call('HGETALL', SLABS), 0
for i = 1, #slabs, 2 do
    local slab, n_slots = slabs[i], tonumber(slabs[i + 1])
    local fresh = tonumber(redis.call('HGET', FRESH, slab))
    local keys = redis.call('ZRANGE', base .. 'lru:' .. slab, 0, -1)
    local held = redis.call('ZRANGE', base .. 'held:' .. slab, 0, -1)
    local seen = {}
    for _, number in ipairs(held) do seen[number] = true end
    for _, key in ipairs(keys) do
        local b = bound(key)
        if not b or b.slab ~= slab then return 'no binding for ' .. key end
        if seen[b.number] then return 'slot ' .. b.number .. ' of ' .. slab .. ' is taken twice' end
        seen[b.number] = true
    end
    if #keys + #held ~= fresh or fresh > n_slots then
        return slab .. ': ' .. #keys .. ' bound and ' .. #held .. ' held are not the ' .. fresh ..
            ' slots in use of ' .. n_slots
    end
    n_bound = n_bound + #keys
end
if n_bound ~= redis.call('HLEN', BIND) then return 'some bindings are of no slab' end
return ''
"""

ALL = {
    "lookup": _COMMON + _LOOKUP,
    "reserve": _COMMON + _RESERVE,
    "publish": _COMMON + _PUBLISH,
    "release": _COMMON + _RELEASE,
    "delete": _COMMON + _DELETE,
    "restore": _COMMON + _RESTORE,
    "restore_free": _COMMON + _RESTORE_FREE,
    "register": _COMMON + _REGISTER,
    "totals": _COMMON + _TOTALS,
    "check": _COMMON + _CHECK,
}
"""Name -> text."""
