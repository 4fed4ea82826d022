package trace

import (
	"math/bits"
	"os"
	"slices"
	"sync"

	"golang.org/x/sys/unix"
)

const (
	// maxAccesses of a recording: 3 MiB. A profile has room for some hundredth of that.
	maxAccesses = 1 << 16
	// maxWords of 64 pages of which it is remembered whether they were needed: some 5 MiB, for up to 16 GiB of files.
	maxWords = 1 << 16
	// maxRun is how many pages one call may add.
	maxRun = 1 << 22
	// lastPage keeps offsets within what a file can have.
	lastPage = 1 << 50
)

// word is 64 pages of a file.
type word struct{ device, inode, number uint64 }

// collector has pages in order of first need, each once, in bounded memory.
type collector struct {
	devices []uint64

	mu       sync.Mutex // guards what follows
	readyAt  int64      // ns of CLOCK_MONOTONIC, or 0
	seen     map[word]uint64
	accesses []Access
	lost     uint64
}

func newCollector(roots []root) *collector {
	return &collector{devices: devices(roots), seen: map[word]uint64{}}
}

// monotonic is now, by the clock that the kernel's events have.
func monotonic() int64 {
	var now unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &now) // cannot fail
	return now.Nano()
}

func (c *collector) ready() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.readyAt == 0 {
		c.readyAt = monotonic()
	}
}

// readySince is when ready was called first, or 0.
func (c *collector) readySince() int64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.readyAt
}

// add has pages needed at a time by CLOCK_MONOTONIC. Those of other devices it leaves out; those that it has no room for, or that no
// file can have, count as one loss.
func (c *collector) add(device, inode, first, pages uint64, at int64) {
	if !slices.Contains(c.devices, device) {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if pages == 0 || pages > maxRun || first > lastPage {
		c.lost++
		return
	}
	ready := c.readyAt != 0 && at >= c.readyAt
	for end := first + pages; first < end; {
		n := min(64-first%64, end-first)
		if !c.addWord(word{device, inode, first / 64}, uint(first%64), uint(n), ready) {
			c.lost++
			return
		}
		first += n
	}
}

// addWord is add for n pages of one word; it wants c.mu, and is false if there is no room.
func (c *collector) addWord(w word, first, n uint, ready bool) bool {
	needed := ^uint64(0) >> (64 - n) << first
	seen, known := c.seen[w]
	fresh := needed &^ seen
	if fresh == 0 {
		return true
	}
	if !known && len(c.seen) >= maxWords {
		return false
	}
	for fresh != 0 {
		at := uint(bits.TrailingZeros64(fresh))
		run := uint(bits.TrailingZeros64(^(fresh >> at)))
		if !c.append(w, at, run, ready) {
			return false
		}
		added := ^uint64(0) >> (64 - run) << at
		fresh &^= added
		c.seen[w] |= added
	}
	return true
}

// append has a run of pages in the order; it wants c.mu, and is false if there is no room.
func (c *collector) append(w word, first, pages uint, ready bool) bool {
	size := int64(os.Getpagesize())
	a := Access{
		Device: w.device, Inode: w.inode, Ready: ready,
		Offset: (int64(w.number)*64 + int64(first)) * size, Length: int64(pages) * size,
	}
	if n := len(c.accesses); n > 0 {
		last := &c.accesses[n-1]
		if last.Device == a.Device && last.Inode == a.Inode && last.Ready == a.Ready && last.Offset+last.Length == a.Offset {
			last.Length += a.Length
			return true
		}
	}
	if len(c.accesses) >= maxAccesses {
		return false
	}
	c.accesses = append(c.accesses, a)
	return true
}

// result is what there is, and how much there was no room for. What is added later is in later results.
func (c *collector) result() ([]Access, uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.accesses), c.lost
}
