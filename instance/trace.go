package instance

import (
	"cmp"
	"slices"
	"sync"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
)

// Phases of an activation. An image that is pulled has its own within phaseImage: resolve, fetch, decompress, unpack.
const (
	phaseImage    = "image"    // until the image is known to be here
	phaseSnapshot = "snapshot" // a root file system that was not prepared ahead
	phaseTurn     = "turn"     // until others that started at the same time left a core
	phaseCreate   = "create"   // the container made the Function's, until its process is executed
	phaseProcess  = "process"  // until it listens
	phaseThaw     = "thaw"     // a frozen process let go on
	phaseResume   = "resume"   // its loader made ready after a thaw
	phaseBoot     = "boot"     // a Runtime that was not booted ahead
	phaseMount    = "mount"    // the Function's code and secrets, log and limits
	phaseLoad     = "load"     // the code by the loader, whose own phases follow it in their names
)

// trace collects the phases of one start, from begin on.
type trace struct {
	begin time.Time
	mu    sync.Mutex // guards list
	list  []*hearthv1.Phase
}

func newTrace(begin time.Time) *trace { return &trace{begin: begin} }

// add notes a phase. What began before the trace, a pull that another start has set off for example, counts from its beginning.
func (t *trace) add(name string, start time.Time, duration, busy time.Duration) {
	offset := start.Sub(t.begin)
	if offset < 0 {
		duration, offset = duration+offset, 0
	}
	if duration < 0 {
		return
	}
	p := &hearthv1.Phase{Name: name, Offset: durationpb.New(offset), Duration: durationpb.New(duration)}
	if busy > 0 {
		p.Busy = durationpb.New(busy)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.list = append(t.list, p)
}

// since notes a phase that ends now.
func (t *trace) since(name string, start time.Time) { t.add(name, start, time.Since(start), 0) }

// phases returns what was noted, by offset; the longer of two that begin together comes first, for it contains the other.
func (t *trace) phases() []*hearthv1.Phase {
	t.mu.Lock()
	defer t.mu.Unlock()
	sorted := slices.Clone(t.list)
	slices.SortStableFunc(sorted, func(a, b *hearthv1.Phase) int {
		return cmp.Or(cmp.Compare(a.Offset.AsDuration(), b.Offset.AsDuration()),
			cmp.Compare(b.Duration.AsDuration(), a.Duration.AsDuration()))
	})
	return sorted
}
