package bench

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/hearth-serverless/hearth/bench/disk"
)

// prefetchSuite measures starts of Functions whose images are on the node and whose files are not in memory, in cases IMAGE/DISK. A
// Function is at zero and a sandbox stands in the pool; all that the node keeps, layers among it, is on a file system on that disk
// (see package disk). Before each start but those of the disk `cached` the machine's page cache is dropped, with names and inodes, and the node's
// own programs (containerd, its shim, runc, Hearth's) are read again, as a node has them that starts functions. Systems are three
// deployments side by side on one file system, each with layers of its own, that differ in nodeagent's --prefetch. None of them keeps
// anything in memory between starts (--prefetch-keep 0), as what is kept would not be dropped:
//
//   - hearth: profile, after three starts of the image that were recorded.
//   - no-prefetch: none.
//   - whole: whole.
//
// Metrics:
//
//   - ready_time: from the request at the gateway to the last byte of the first answer.
//   - bytes_read_ahead: by nodeagent's own count, of this start.
//   - bytes_from_disk: what the disk was read in all, until no more is. Of the system `needed` it is what a start of no-prefetch reads
//     once the kernel's read-ahead is off too, by device and EROFS alike: pages that the start has used and what leads to them.
//   - bytes_wasted: bytes_from_disk beyond that, and at most bytes_read_ahead. The kernel's own read-ahead for the rest of what was read
//     is in it, so it is no less than what was read ahead in vain.
func prefetchSuite(ctx context.Context, o *Options, r *Report) error {
	cases, err := o.prefetchCases()
	if err != nil {
		return err
	}
	clock := newQuickClock(o, len(cases))
	var failed []error
	for len(cases) > 0 && ctx.Err() == nil {
		alike := 1
		for alike < len(cases) && cases[alike].speed() == cases[0].speed() {
			alike++
		}
		err := withPrefetch(ctx, o, r, cases[:alike], func(p *prefetching) {
			for _, c := range cases[:alike] {
				if err := p.measure(ctx, c, clock); err != nil {
					o.say("%s cannot be measured: %v", c, err)
					failed = append(failed, fmt.Errorf("case %s: %w", c, err))
				}
			}
		})
		if err != nil {
			return errors.Join(append(failed, err)...)
		}
		cases = cases[alike:]
	}
	r.prefetchBounds()
	return errors.Join(append(failed, ctx.Err())...)
}

// prefetching is a disk with a deployment of each system on it.
type prefetching struct {
	o       *Options
	report  *Report
	disk    *disk.Disk
	systems []prefetchSystem
	// knobs are files that say how much the kernel reads ahead of the disk and of layers on it.
	knobs []string
	// learnt are images that hearth knows, and needed what their starts read.
	learnt map[string]bool
	needed map[string]float64
}

type prefetchSystem struct {
	name  string
	stack *machineStack
}

// diskParent is where disks are: the folder of what is large and outlives no run, which is on a disk where /tmp is in memory.
const diskParent = "/var/tmp"

// withPrefetch brings up what cases of one disk need.
func withPrefetch(ctx context.Context, o *Options, r *Report, cases []prefetchCase, run func(*prefetching)) (err error) {
	p := &prefetching{o: o, report: r, learnt: map[string]bool{}, needed: map[string]float64{}}
	speed := cases[0].speed()
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("find the program that serves disks: %w", err)
	}
	if p.disk, err = disk.New(ctx, diskParent, disk.Named()[speed], self, ServeDisk); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.disk.Close()) }()
	measured, err := p.disk.Measure(ctx)
	if err != nil {
		return err
	}
	r.Machine.addDisk(speed, measured)
	r.note(fmt.Sprintf("disk %s: %s", speed, measured))
	o.say("disk %s: %s", speed, measured)
	before, err := erofsKnobs()
	if err != nil {
		return err
	}
	for i, mode := range prefetchModes() {
		dir := filepath.Join(p.disk.Dir, mode.system)
		if err := os.Mkdir(dir, 0o711); err != nil {
			return fmt.Errorf("make a folder for %s: %w", mode.system, err)
		}
		st, err := startStack(ctx, o, dir, stackOptions{registry: i == 0, pool: 1, node: []string{"--prefetch", mode.flag, "--prefetch-keep", "0"}})
		if err != nil {
			return fmt.Errorf("%s: %w", mode.system, err)
		}
		defer func() { err = errors.Join(err, st.stop()) }()
		p.systems = append(p.systems, prefetchSystem{mode.system, st})
	}
	if err := p.deploy(ctx, cases); err != nil {
		return err
	}
	after, err := erofsKnobs()
	if err != nil {
		return err
	}
	p.knobs = append(slices.DeleteFunc(after, func(f string) bool { return slices.Contains(before, f) }), p.disk.ReadAheadFile())
	run(p)
	return nil
}

// deploy has every system know the cases' Functions, and have their images.
func (p *prefetching) deploy(ctx context.Context, cases []prefetchCase) error {
	var done []string
	for _, c := range cases {
		if slices.Contains(done, c.image) {
			continue
		}
		done = append(done, c.image)
		ref, err := p.o.push(ctx, p.systems[0].stack.status.Registry, c.image)
		if err != nil {
			return err
		}
		for _, s := range p.systems {
			if err := s.stack.deployImage(ctx, p.o, c.image, ref); err != nil {
				return fmt.Errorf("%s: %w", s.name, err)
			}
		}
	}
	return nil
}

// measure takes all samples of a case.
func (p *prefetching) measure(ctx context.Context, c prefetchCase, clock *quickClock) error {
	end := clock.share()
	if err := p.learn(ctx, c); err != nil {
		return err
	}
	if err := p.need(ctx, c); err != nil {
		return err
	}
	for round := range p.o.rounds(3, 10) {
		for i := range p.systems {
			s := p.systems[(i+round)%len(p.systems)]
			if err := p.sample(ctx, c, s); err != nil {
				return fmt.Errorf("round %d: %s: %w", round+1, s.name, err)
			}
		}
		if clock.quick && time.Now().After(end) {
			break
		}
	}
	for _, s := range p.systems {
		if row := p.report.Row(c.String(), s.name, readyTime); row != nil {
			p.o.say("%-18s %-12s p50 %s s of %d", c, s.name, number(row.P50), row.N)
		}
	}
	return nil
}

// learn has hearth record three starts of the case's image. Of one that is to be in memory, it has every system start it once.
func (p *prefetching) learn(ctx context.Context, c prefetchCase) error {
	if c.disk == cachedDisk {
		for _, s := range p.systems {
			if _, err := p.start(ctx, c, s); err != nil {
				return fmt.Errorf("have %s in memory: %s: %w", c.image, s.name, err)
			}
		}
	}
	if p.learnt[c.image] {
		return nil
	}
	const starts = 3
	s := p.systems[0]
	for i := range starts {
		p.o.say("%s: start %d of %d that is recorded", c, i+1, starts)
		before, err := s.counts(ctx)
		if err != nil {
			return err
		}
		if _, err := p.start(ctx, prefetchCase{c.image, c.speed()}, s); err != nil {
			return fmt.Errorf("start that is to be recorded: %w", err)
		}
		if err := s.awaitRecorded(ctx, before); err != nil {
			return err
		}
	}
	p.learnt[c.image] = true
	return nil
}

// need finds out what a start reads for which nothing is read ahead.
func (p *prefetching) need(ctx context.Context, c prefetchCase) (err error) {
	if c.disk == cachedDisk {
		return nil
	}
	p.o.say("%s: a start for which nothing is read ahead, not by the kernel either", c)
	restore, err := setKnobs(p.knobs, "0")
	defer func() { err = errors.Join(err, restore()) }()
	if err != nil {
		return err
	}
	one, err := p.start(ctx, c, p.systems[slices.IndexFunc(p.systems, func(s prefetchSystem) bool { return s.name == readsNothing })])
	if err != nil {
		return fmt.Errorf("start without read-ahead: %w", err)
	}
	p.needed[c.String()] = one.fromDisk
	p.report.Add(c.String(), needed, bytesFromDisk, "bytes", one.fromDisk)
	return nil
}

// sample files what one start was like.
func (p *prefetching) sample(ctx context.Context, c prefetchCase, s prefetchSystem) error {
	one, err := p.start(ctx, c, s)
	if err != nil {
		return err
	}
	wasted := min(max(one.fromDisk-p.needed[c.String()], 0), one.ahead)
	p.report.Add(c.String(), s.name, readyTime, "s", one.ready.Seconds())
	p.report.Add(c.String(), s.name, bytesReadAhead, "bytes", one.ahead)
	p.report.Add(c.String(), s.name, bytesWasted, "bytes", wasted)
	p.report.Add(c.String(), s.name, bytesFromDisk, "bytes", one.fromDisk)
	return nil
}

// readStart is what a start took, and what was read for it.
type readStart struct {
	ready           time.Duration
	ahead, fromDisk float64
}

// start starts the case's Function in a system, from where the case begins.
func (p *prefetching) start(ctx context.Context, c prefetchCase, s prefetchSystem) (one readStart, err error) {
	if err := errors.Join(s.stack.reset(ctx, c.image, false), rest(ctx)); err != nil {
		return one, err
	}
	if c.disk != cachedDisk {
		if err := errors.Join(p.forget(), rest(ctx)); err != nil {
			return one, err
		}
	}
	before, err := s.counts(ctx)
	if err != nil {
		return one, err
	}
	read, err := p.disk.ReadBytes()
	if err != nil {
		return one, err
	}
	client := newClient()
	defer client.CloseIdleConnections()
	got, err := ask(ctx, client, s.stack.url(c.image), nil)
	if err != nil {
		return one, fmt.Errorf("start %s: %w", c.image, err)
	}
	all, err := p.settled(ctx)
	if err != nil {
		return one, err
	}
	after, err := s.counts(ctx)
	return readStart{got.last, after.ahead - before.ahead, float64(all - read)}, err
}

// settled is what was read of the disk, once nobody reads any more.
func (p *prefetching) settled(ctx context.Context) (bytes int64, err error) {
	const pause, quiet, patience = 100 * time.Millisecond, 5, 600
	for still, i := 0, 0; still < quiet && i < patience; i++ {
		select {
		case <-ctx.Done():
			return 0, ctx.Err()
		case <-time.After(pause):
		}
		now, err := p.disk.ReadBytes()
		if err != nil {
			return 0, err
		}
		if still++; now != bytes {
			still = 0
		}
		bytes = now
	}
	return bytes, nil
}

// forget drops what the machine has in memory of files, but for the programs that start Functions.
func (p *prefetching) forget() error {
	if err := syncFS(p.disk.Dir); err != nil {
		return err
	}
	if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0); err != nil {
		return fmt.Errorf("drop the page cache: %w", err)
	}
	for dir, names := range map[string][]string{
		p.o.Tools: {"containerd", "containerd-shim-runc-v2", "runc"},
		p.o.Bin:   {"nodeagent", "poolmanager", "gateway", "launcher", "logwriter"},
	} {
		for _, name := range names {
			if err := readFile(filepath.Join(dir, name)); err != nil {
				return err
			}
		}
	}
	return nil
}

// readFile has a file in memory.
func readFile(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = io.Copy(io.Discard, f)
	return err
}

// prefetchCounts are a nodeagent's since it started.
type prefetchCounts struct{ ahead, recorded float64 }

func (s prefetchSystem) counts(ctx context.Context) (n prefetchCounts, err error) {
	admin, err := s.stack.admin("nodeagent")
	if err != nil {
		return n, err
	}
	err = scrape(ctx, admin, func(metrics io.Reader) error {
		n, err = parsePrefetchCounts(metrics)
		return err
	})
	return n, err
}

// parsePrefetchCounts reads Prometheus' text. What has not happened yet need not be in it.
func parsePrefetchCounts(metrics io.Reader) (n prefetchCounts, err error) {
	lines := bufio.NewScanner(metrics)
	for lines.Scan() {
		name, value, _ := strings.Cut(lines.Text(), " ")
		var to *float64
		switch name {
		case "hearth_prefetch_ahead_bytes_total":
			to = &n.ahead
		case `hearth_prefetch_recordings_total{outcome="learned"}`:
			to = &n.recorded
		default:
			continue
		}
		if *to, err = strconv.ParseFloat(value, 64); err != nil {
			return n, fmt.Errorf("read nodeagent's metrics: %s: %w", name, err)
		}
	}
	return n, lines.Err()
}

// awaitRecorded waits until one more start than before was learnt from.
func (s prefetchSystem) awaitRecorded(ctx context.Context, before prefetchCounts) error {
	const patience, pause = time.Minute, 100 * time.Millisecond
	for end := time.Now().Add(patience); ; {
		now, err := s.counts(ctx)
		if err != nil || now.recorded > before.recorded {
			return err
		}
		if time.Now().After(end) {
			d, err := s.stack.daemon("nodeagent")
			return errors.Join(fmt.Errorf("nodeagent has recorded nothing of a start: %s", tail(d.Log)), err)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(pause):
		}
	}
}

// erofsKnobs are the files that say how much is read ahead of EROFS file systems.
func erofsKnobs() ([]string, error) {
	files, err := filepath.Glob("/sys/class/bdi/erofs-*/read_ahead_kb")
	if err != nil {
		return nil, fmt.Errorf("find file systems: %w", err)
	}
	return files, nil
}

// setKnobs writes a value to files, and returns what writes back their old ones, also after an error. Those of file systems that are
// gone are left out.
func setKnobs(files []string, value string) (restore func() error, err error) {
	old := map[string][]byte{}
	restore = func() error {
		var errs []error
		for file, value := range old {
			errs = append(errs, ignoreMissing(os.WriteFile(file, value, 0)))
		}
		return errors.Join(errs...)
	}
	for _, file := range files {
		was, err := os.ReadFile(file)
		if err == nil {
			err = os.WriteFile(file, []byte(value), 0)
		}
		if ignoreMissing(err) != nil {
			return restore, fmt.Errorf("set %s: %w", file, err)
		}
		if err == nil {
			old[file] = was
		}
	}
	return restore, nil
}

// ServeDisk is the word by which a process of this program is told to serve a disk (see package disk).
const ServeDisk = "serve-disk"
