package instance

import (
	"bytes"
	"cmp"
	"context"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/internal/host"
)

// frozenInterval is how often frozen Instances are looked after: whether somebody wants one ended, and whether the node has
// memory for them all. A look at one takes some 20 µs.
const frozenInterval = time.Second

// Why a frozen Instance is given up.
const (
	evictCount    = "count"
	evictBytes    = "bytes"
	evictPressure = "pressure"
)

// keep is a frozen Instance as an eviction sees it.
type keep struct {
	id    string
	age   time.Duration // since it was frozen
	thaws int           // how often it was needed again
	bytes int64
}

// worth of keeping a frozen Instance: how recently it was needed and how often, for the memory that it takes. It is the rule of
// GreedyDual-Size-Frequency caches (Cherkasova, 1998) with the age in the place of their clock.
func (k keep) worth() float64 {
	const mib = 1 << 20
	return float64(1+k.thaws) / (1 + k.age.Seconds()) / max(float64(k.bytes)/mib, 1)
}

// surplus returns which of the frozen Instances have to go for the rest to stay within count and total, least worth first, with
// the bound that each breaks.
func surplus(all []keep, count int, total int64) (ids []string, reasons []string) {
	all = slices.Clone(all)
	slices.SortFunc(all, func(a, b keep) int { return cmp.Or(cmp.Compare(a.worth(), b.worth()), cmp.Compare(a.id, b.id)) })
	var used int64
	for _, k := range all {
		used += k.bytes
	}
	for _, k := range all {
		reason := ""
		switch {
		case len(all)-len(ids) > count:
			reason = evictCount
		case used > total:
			reason = evictBytes
		default:
			return ids, reasons
		}
		ids, reasons = append(ids, k.id), append(reasons, reason)
		used -= k.bytes
	}
	return ids, reasons
}

// watchFrozen looks after the frozen Instances until ctx is done.
func (e *Engine) watchFrozen(ctx context.Context) error {
	ticker := time.NewTicker(frozenInterval)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
		all := e.frozen()
		if len(all) == 0 {
			continue
		}
		for _, k := range all {
			e.endIfSignalled(k.id)
		}
		e.evictSurplus()
		short, err := host.ShortOfMemory(e.proc, e.cfg.MemoryPressure)
		if err != nil {
			e.log.Warn("the node's memory is not known", "error", err)
		}
		if short { // one at a time: the kernel's average follows slowly
			if ids, _ := surplus(all, len(all)-1, e.cfg.FrozenBytes); len(ids) > 0 {
				e.evict(ids[0], evictPressure)
			}
		}
	}
}

// frozen lists the Instances that are.
func (e *Engine) frozen() []keep {
	var all []keep
	var total int64
	for _, i := range e.all() {
		i.mu.Lock()
		if i.state == hearthv1.State_STATE_FROZEN {
			all = append(all, keep{id: i.id, age: time.Since(i.frozen.since), thaws: i.frozen.thaws, bytes: i.frozen.bytes})
			total += i.frozen.bytes
		}
		i.mu.Unlock()
	}
	e.metrics.frozenBytes.Set(float64(total))
	return all
}

// evictSurplus gives up what is frozen beyond the bounds.
func (e *Engine) evictSurplus() {
	ids, reasons := surplus(e.frozen(), max(e.cfg.MaxFrozen, 0), e.cfg.FrozenBytes)
	for n, id := range ids {
		e.evict(id, reasons[n])
	}
}

// evict discards an Instance if it is still frozen: a claim may have been faster.
func (e *Engine) evict(id, reason string) {
	i, ok := e.lookup(id)
	if !ok {
		return
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.state != hearthv1.State_STATE_FROZEN {
		return
	}
	grace := e.cfg.Grace
	if reason == evictPressure {
		grace = 0 // it would touch its memory in order to end
	}
	e.log.Info("frozen instance evicted", "instance", id, "function", i.revision.GetFunction(), "reason", reason,
		"bytes", i.frozen.bytes, "thaws", i.frozen.thaws)
	e.metrics.evictions.WithLabelValues(reason).Inc()
	e.endLocked(i, hearthv1.State_STATE_DRAINING, grace)
}

// endIfSignalled discards a frozen Instance that somebody else wants to end: a signal like SIGTERM waits for its process, which
// cannot take it. What the kubelet or ctr have begun ends so within the second, and the grace.
func (e *Engine) endIfSignalled(id string) {
	i, ok := e.lookup(id)
	if !ok {
		return
	}
	i.mu.Lock()
	pid, version := i.pid, i.version
	i.mu.Unlock()
	text, err := os.ReadFile(filepath.Join(e.proc, strconv.FormatUint(uint64(pid), 10), "status"))
	if err != nil || !endPending(text) { // a process that is not there is told by its exit
		return
	}
	e.endFrozen(i, version, "it was sent a signal to end")
}

// endFrozen discards an Instance that is frozen and has not changed since it had a version.
func (e *Engine) endFrozen(i *instance, version int64, reason string) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.state == hearthv1.State_STATE_FROZEN && i.version == version {
		e.log.Warn("frozen instance is ended", "instance", i.id, "reason", reason)
		e.endLocked(i, hearthv1.State_STATE_DRAINING, e.cfg.Grace)
	}
}

// endSignals are those that ask a process to end: SIGHUP, SIGINT, SIGQUIT, SIGKILL, SIGTERM, as /proc numbers them.
const endSignals = 1<<(1-1) | 1<<(2-1) | 1<<(3-1) | 1<<(9-1) | 1<<(15-1)

// endPending reads of /proc/PID/status whether one of endSignals is pending for the process or its first thread; see proc(5).
func endPending(status []byte) bool {
	for line := range bytes.Lines(status) {
		name, mask, ok := strings.Cut(strings.TrimSpace(string(line)), ":")
		if !ok || name != "SigPnd" && name != "ShdPnd" {
			continue
		}
		if bits, err := strconv.ParseUint(strings.TrimSpace(mask), 16, 64); err == nil && bits&endSignals != 0 {
			return true
		}
	}
	return false
}
