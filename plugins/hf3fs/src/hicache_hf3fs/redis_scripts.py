"""The Lua scripts of the Redis metadata; KEYS[1] is the base of all names.

Generations are 62-bit numbers: they stay text here, since Lua would round them. Only their upper
part, the time, is computed with.
"""

from __future__ import annotations

_COMMON = """
local base = KEYS[1]
local BIND, SLABS, FRESH = base .. 'bind', base .. 'slabs', base .. 'fresh'
local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1e6
local function text(seconds) return string.format('%.6f', seconds) end
local SPACES, PINS, AGES = base .. 'spaces', base .. 'pins', base .. 'ages'
local function unpack_binding(value)
    local slab, number, gen, nbytes, till, pinned =
        string.match(value, '^(.-)|(.-)|(.-)|(.-)|(.-)|(.-)$')
    return {slab = slab, number = number, gen = gen, nbytes = nbytes, till = tonumber(till),
            pinned = pinned == '1'}
end
local function pack_binding(b)
    return table.concat({b.slab, b.number, b.gen, b.nbytes, text(b.till), b.pinned and '1' or '0'},
                        '|')
end
local function space_of(key) return string.match(key, '^[^/]*') end
-- The zset that has the last use of this key.
local function order(key, b)
    return base .. (b.pinned and 'pinned:' or 'lru:') .. b.slab .. ':' .. space_of(key)
end
local function written_at(gen) return math.floor(tonumber(gen) / 2^20) / 1000 end
local function bind(key, b, used_at)
    redis.call('HSET', BIND, key, pack_binding(b))
    redis.call('ZADD', order(key, b), text(used_at), key)
    redis.call('HINCRBY', SPACES, space_of(key), b.nbytes)
    if TTL then redis.call('ZADD', AGES, text(written_at(b.gen)), key) end
end
-- The key is gone; the slot is free as soon as the last lease on it has ended.
local function unbind(key, b)
    redis.call('HDEL', BIND, key)
    redis.call('ZREM', order(key, b), key)
    redis.call('ZREM', PINS, key)
    redis.call('ZREM', AGES, key)
    redis.call('HINCRBY', SPACES, space_of(key), string.format('%.0f', 0 - b.nbytes))
    redis.call('ZADD', base .. 'held:' .. b.slab, text(b.till), b.number)
end
local function bound(key)
    local value = redis.call('HGET', BIND, key)
    if not value then return nil end
    local b = unpack_binding(value)
    if TTL and written_at(b.gen) <= now - TTL then
        unbind(key, b)
        return nil
    end
    return b
end
local function set_pinned(key, b, pinned)
    if b.pinned == pinned then return end
    local used_at = redis.call('ZSCORE', order(key, b), key)
    redis.call('ZREM', order(key, b), key)
    b.pinned = pinned
    redis.call('HSET', BIND, key, pack_binding(b))
    redis.call('ZADD', order(key, b), used_at, key)
end
-- Lets go what is over, a part of it if it is much; how many objects that were expired.
local function let_go()
    for _, key in ipairs(redis.call('ZRANGEBYSCORE', PINS, '-inf', text(now), 'LIMIT', 0, 1000)) do
        redis.call('ZREM', PINS, key)
        set_pinned(key, unpack_binding(redis.call('HGET', BIND, key)), false)
    end
    if not TTL then return 0 end
    local expired = redis.call('ZRANGEBYSCORE', AGES, '-inf', text(now - TTL), 'LIMIT', 0, 1000)
    for _, key in ipairs(expired) do unbind(key, unpack_binding(redis.call('HGET', BIND, key))) end
    return #expired
end
-- Visits the objects of several orders, merged, the least recently used first, up to ``before``.
-- ``visit`` answers whether the object is gone; nil ends it.
local function each_oldest(orders, before, visit)
    local heads = {}
    local function fill(head)
        head.page = redis.call('ZRANGEBYSCORE', head.name, '-inf', '(' .. text(before),
                               'WITHSCORES', 'LIMIT', head.left, 64)
        head.at = 1
    end
    for i, name in ipairs(orders) do
        heads[i] = {name = name, left = 0}
        fill(heads[i])
    end
    while true do
        local first
        for _, head in ipairs(heads) do
            if head.at > #head.page and #head.page > 0 then fill(head) end
            local used_at = tonumber(head.page[head.at + 1])
            if used_at and (not first or used_at < tonumber(first.page[first.at + 1])) then
                first = head
            end
        end
        if not first then return end
        local key = first.page[first.at]
        first.at = first.at + 2
        local gone = visit(key, unpack_binding(redis.call('HGET', BIND, key)))
        if gone == nil then return end
        if not gone then first.left = first.left + 1 end
    end
end
-- Makes room for so many bytes under the cap; false, and all is as before, if that cannot be.
local function fit(space, nbytes, before)
    if not QUOTA then return true end
    nbytes = tonumber(nbytes)
    local excess = nbytes + tonumber(redis.call('HGET', SPACES, space) or '0') - QUOTA
    if excess <= 0 then return true end
    if nbytes > QUOTA then return false end
    local slabs, victims = redis.call('HKEYS', SLABS), {}
    for _, kind in ipairs({'lru:', 'pinned:'}) do
        local orders = {}
        for i, slab in ipairs(slabs) do orders[i] = base .. kind .. slab .. ':' .. space end
        each_oldest(orders, before, function(key, b)
            if excess <= 0 then return nil end
            victims[#victims + 1] = {key, b}
            excess = excess - b.nbytes
            return false
        end)
    end
    if excess > 0 then return false end
    for _, victim in ipairs(victims) do unbind(victim[1], victim[2]) end
    return true
end
"""

_LOOKUP = """
local lease, answers = tonumber(ARGV[1]), {}
for i = 2, #ARGV do
    local b = bound(ARGV[i])
    answers[i - 1] = b and pack_binding(b) or false
    if b and b.till < now + lease then
        b.till = now + 2 * lease
        local leased = redis.pcall('HSET', BIND, ARGV[i], pack_binding(b))
        if type(leased) == 'table' then
            answers[i - 1] = false  -- no memory for it: without a lease it cannot be read
        else
            redis.call('ZADD', order(ARGV[i], b), text(now), ARGV[i])
        end
    end
end
return answers
"""

_RESERVE = """
local slab, write_lease = ARGV[1], tonumber(ARGV[2])
local n_slots = tonumber(redis.call('HGET', SLABS, slab) or '')
if not n_slots then return redis.error_reply('UNKNOWNSLAB ' .. slab) end
local HELD, GEN = base .. 'held:' .. slab, base .. 'gen:' .. slab
let_go()
local stored = {}
for i = 3, #ARGV, 3 do
    local b = bound(ARGV[i])
    stored[i] = b and b.nbytes == ARGV[i + 1]
    -- Touched, so that making room for the others of this call cannot remove it.
    if b then redis.call('ZADD', order(ARGV[i], b), text(now), ARGV[i]) end
end
local need, stop, needed = 0, #ARGV, {}
for i = 3, #ARGV, 3 do
    if not stored[i] then
        local space = space_of(ARGV[i])
        needed[space] = (needed[space] or 0) + tonumber(ARGV[i + 1])
        if not fit(space, needed[space], now) then
            stop = i - 1
            break
        end
        need = need + 1
    end
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
for _, kind in ipairs({'lru:', 'pinned:'}) do
    local orders = {}
    for i, space in ipairs(#free < need and redis.call('HKEYS', SPACES) or {}) do
        orders[i] = base .. kind .. slab .. ':' .. space
    end
    each_oldest(orders, now, function(key, b)
        if #free >= need then return nil end
        if b.till > now then return false end
        unbind(key, b)
        free[#free + 1] = b.number
        return true
    end)
end
local answers, n = {}, 0
for i = 3, stop, 3 do
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
let_go()
local answers = {}
-- What this call binds is used a little before now, so nothing of it goes to make room.
local before = now - #ARGV * 1e-6
for i = 1, #ARGV, 5 do
    local key, nbytes, slab, number, gen = unpack(ARGV, i, i + 4)
    local HELD, GEN = base .. 'held:' .. slab, base .. 'gen:' .. slab
    local mine = redis.call('HGET', GEN, number) == gen
    local other = mine and bound(key)
    if mine then redis.call('HDEL', GEN, number) end
    if not mine then
        answers[#answers + 1] = 0
    elseif other and other.nbytes == nbytes then  -- somebody was faster; nobody has seen ours
        redis.call('ZADD', HELD, 0, number)
        answers[#answers + 1] = 1
    else
        if other then unbind(key, other) end
        if fit(space_of(key), nbytes, before) then
            redis.call('ZREM', HELD, number)
            local b = {slab = slab, number = number, gen = gen, nbytes = nbytes, till = 0}
            -- Of objects that came in one call the last goes first: the others are of use alone.
            bind(key, b, now - i * 1e-6)
            answers[#answers + 1] = 1
        else  -- others have published since the reservation
            redis.call('ZADD', HELD, 0, number)
            answers[#answers + 1] = 0
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
        bind(key, b, now)
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

_PIN = """
local ttl, n = tonumber(ARGV[1]), 0
for i = 2, #ARGV do
    local b = bound(ARGV[i])
    if b then
        n = n + 1
        if ttl > 0 then
            redis.call('ZADD', PINS, text(now + ttl), ARGV[i])
        else
            redis.call('ZREM', PINS, ARGV[i])
        end
        set_pinned(ARGV[i], b, ttl > 0)
    end
end
return n
"""

_LET_GO = "return let_go()"

_TOTALS = """
local slab, n_bound = ARGV[1], 0
for _, space in ipairs(redis.call('HKEYS', SPACES)) do
    for _, kind in ipairs({'lru:', 'pinned:'}) do
        n_bound = n_bound + redis.call('ZCARD', base .. kind .. slab .. ':' .. space)
    end
end
return {
    tonumber(redis.call('HGET', SLABS, slab) or '0'),
    n_bound,
    redis.call('ZCOUNT', base .. 'held:' .. slab, '(' .. text(now), '+inf'),
}
"""

_CHECK = """
local slabs, spaces = redis.call('HGETALL', SLABS), redis.call('HGETALL', SPACES)
local n_bound, n_pinned, nbytes = 0, 0, {}
-- Checks one key of a slab; what is wrong with it.
local function wrong(key, slab, kind, seen)
    local b = unpack_binding(redis.call('HGET', BIND, key) or '||||0|0')
    if b.slab ~= slab or b.pinned ~= (kind == 'pinned:') then return 'no binding for ' .. key end
    if seen[b.number] then return 'slot ' .. b.number .. ' of ' .. slab .. ' is taken twice' end
    seen[b.number] = true
    n_bound = n_bound + 1
    if b.pinned then n_pinned = n_pinned + 1 end
    local space = space_of(key)
    nbytes[space] = (nbytes[space] or 0) + b.nbytes
end
for i = 1, #slabs, 2 do
    local slab, n_slots, n_before = slabs[i], tonumber(slabs[i + 1]), n_bound
    local fresh = tonumber(redis.call('HGET', FRESH, slab))
    local held = redis.call('ZRANGE', base .. 'held:' .. slab, 0, -1)
    local seen = {}
    for _, number in ipairs(held) do seen[number] = true end
    for j = 1, #spaces, 2 do
        for _, kind in ipairs({'lru:', 'pinned:'}) do
            local name = base .. kind .. slab .. ':' .. spaces[j]
            for _, key in ipairs(redis.call('ZRANGE', name, 0, -1)) do
                local what = wrong(key, slab, kind, seen)
                if what then return what end
            end
        end
    end
    local n_keys = n_bound - n_before
    if n_keys + #held ~= fresh or fresh > n_slots then
        return slab .. ': ' .. n_keys .. ' bound and ' .. #held .. ' held are not the ' .. fresh ..
            ' slots in use of ' .. n_slots
    end
end
if n_bound ~= redis.call('HLEN', BIND) then return 'some bindings are of no slab' end
if n_pinned ~= redis.call('ZCARD', PINS) then return 'some pins have no end' end
for j = 1, #spaces, 2 do
    if tonumber(spaces[j + 1]) ~= (nbytes[spaces[j]] or 0) then
        return spaces[j] .. ' has ' .. (nbytes[spaces[j]] or 0) .. ' bytes, not ' .. spaces[j + 1]
    end
end
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
    "pin": _COMMON + _PIN,
    "let_go": _COMMON + _LET_GO,
    "totals": _COMMON + _TOTALS,
    "check": _COMMON + _CHECK,
}
"""Name -> text, but for the line of ``limits``, which goes first."""


def limits(ttl_s: float | None, namespace_quota_nbytes: int | None) -> str:
    """Returns the line that passes the limits of the caller to a script."""
    ttl = "nil" if ttl_s is None else repr(float(ttl_s))
    quota = "nil" if namespace_quota_nbytes is None else str(namespace_quota_nbytes)
    return f"local TTL, QUOTA = {ttl}, {quota}\n"
