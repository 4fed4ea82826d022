package bench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/hearth-serverless/hearth/bench/images"
	"github.com/hearth-serverless/hearth/bench/link"
)

// quickTime is what a quick run has, with the building of images that were not cached; it makes one round at least.
const quickTime = 105 * time.Second

// pullSuite pulls images by the kubelet's own call, CRI PullImage, into each system on a new file system in memory, in cases of
// IMAGE/ENCODING/LINK. The image comes from a registry on loopback, over a link as slow as the case says. Metrics:
//
//   - pull_time: until the call returns, with the image unpacked. hearth's includes making it durable, which others leave out.
//   - pull_time_synced: pull_time and then `sync -f`, for all alike.
//   - ready_time: pull_time and the start of a container of the image, until its process listens. The sync is not in it.
//   - bytes_fetched: what the registry wrote meanwhile, headers and all.
//   - fetch_time: of it, the time in which nodeagent awaited at least one range of a layer, by its own metrics, which peers do not
//     have; and fetch_rate, what came in that time. On a bounded link there is only-fetch beside it, which fetches and does no more, and
//     hearth-fetch, which is nodeagent's client with nothing to unpack.
//   - link_wait: the time in which a layer had nothing to be unpacked, and link_used, what came in that time as a share of what the
//     link can do. In the rest of the time the unpacking is what the pull waits for, and the link cannot be full for long.
//   - bytes_written: what went to the disk, until all of it was durable.
//   - cpu_seconds: of the system's daemons and the children that they waited for, from /proc, as of the end of the pull.
//   - prepare_wait: for the image of small files, the longest that the Prepare of another snapshot took beside the pull.
//   - peak_rss: the most memory resident in the process that does the work: containerd, or the snapshotter that it has beside it,
//     where containerd's own is given as peak_rss_containerd. Children are not in it.
//
// In the first round the trees of all systems are read through a mounted snapshot, and compared file by file.
func pullSuite(ctx context.Context, o *Options, r *Report) (err error) {
	started := time.Now()
	p := &puller{o: o, report: r}
	cases, err := o.pullCases()
	if err != nil {
		return err
	}
	if p.systems, err = o.pullSystems(ctx, r); err != nil {
		return err
	}
	if cases = p.possible(ctx, cases); len(cases) == 0 {
		return errors.New("no case is left that can be measured")
	}
	var end func() error
	if p.memory, end, err = memoryDir(os.TempDir()); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, end()) }()
	if p.origin, err = startOrigin(ctx, o, p.memory); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.origin.stop()) }()
	for _, c := range cases { // before the clock of rounds runs
		if _, err := p.origin.ref(ctx, c); err != nil {
			return err
		}
	}
	done, pulling := 0, time.Now()
	for round := range o.rounds(4, 5) {
		for _, c := range cases {
			if o.Quick && round > 0 && time.Since(started)+time.Since(pulling)/time.Duration(done) > quickTime {
				return nil // there is no time for another
			}
			if err := p.round(ctx, round, c); err != nil {
				return fmt.Errorf("pull %s, round %d: %w", c, round+1, err)
			}
			done++
		}
	}
	return nil
}

// smallFiles is the image that makes others wait, if any does.
const smallFiles = "smallfiles"

// puller is a run of the suite.
type puller struct {
	o       *Options
	report  *Report
	memory  string // a folder in memory
	origin  *origin
	systems []string
}

// possible leaves out, aloud, the cases that this build of hearth cannot do.
func (p *puller) possible(ctx context.Context, cases []pullCase) []pullCase {
	if !slices.ContainsFunc(cases, func(c pullCase) bool { return c.encoding == siblings }) || p.o.canAccelerate(ctx) {
		return cases
	}
	p.report.note("siblings are left out: this hearth has no command image accelerate")
	return slices.DeleteFunc(cases, func(c pullCase) bool { return c.encoding == siblings })
}

// round pulls a case with all systems, beginning with another one each time.
func (p *puller) round(ctx context.Context, round int, c pullCase) error {
	trees := map[string]map[string]string{}
	if err := p.fetchAlone(ctx, c); err != nil {
		return err
	}
	for i := range p.systems {
		system := p.systems[(i+round)%len(p.systems)]
		took, tree, err := p.pull(ctx, c, system, round == 0)
		if err != nil {
			return fmt.Errorf("%s: %w", system, err)
		}
		trees[system] = tree
		p.o.say("round %d: %-28s %-16s %.2f s", round+1, c, system, took.Seconds())
	}
	if round > 0 {
		return nil
	}
	return p.compare(c, trees)
}

// fetchAlone measures what a bounded link has for a case.
func (p *puller) fetchAlone(ctx context.Context, c pullCase) error {
	speed := link.Named()[c.link]
	if speed.BytesPerSecond == 0 || c.encoding == siblings { // which of those are taken is the node's choice
		return nil
	}
	layout, err := p.origin.layout(ctx, c)
	if err != nil {
		return err
	}
	layers, err := images.Layers(layout)
	if err != nil {
		return err
	}
	bytes := int64(0)
	for _, l := range layers {
		bytes += l.Bytes
	}
	repository, _, _ := strings.Cut(p.origin.refs[c.image+"-"+c.encoding], ":")
	for system, fetch := range map[string]func(context.Context, string, string, []images.Layer) (time.Duration, error){
		onlyFetch: fetchOnly, hearthFetch: fetchByClient,
	} {
		took, err := fetch(ctx, p.origin.links[c.link], repository, layers)
		if err != nil {
			return err
		}
		p.report.Add(c.String(), system, "fetch_time", "s", took.Seconds())
		p.report.Add(c.String(), system, "link_used", "%", 100*float64(bytes)/took.Seconds()/float64(speed.BytesPerSecond))
	}
	return nil
}

// compare holds hearth's tree to containerd's. A peer may have its own idea of a tree, which the reader is told.
func (p *puller) compare(c pullCase, trees map[string]map[string]string) error {
	reference := p.systems[0]
	if slices.Contains(p.systems, "containerd") {
		reference = "containerd"
	}
	same := []string{reference}
	for _, system := range p.systems {
		if system == reference {
			continue
		}
		diff := Differences(trees[reference], trees[system], 10)
		switch {
		case len(diff) == 0:
			same = append(same, system)
		case reference == "containerd" && system == "hearth":
			return fmt.Errorf("the tree of hearth is not containerd's (first): %q", diff)
		default:
			p.report.note(fmt.Sprintf("the tree of %s is not that of %s (second): %q", reference, system, diff[0]))
		}
	}
	p.o.say("%s: %d files, identical in %s", c, len(trees[reference]), strings.Join(same, ", "))
	return nil
}

// pull pulls a case on a new file system and, if asked to, reads the tree that came of it.
func (p *puller) pull(ctx context.Context, c pullCase, system string, compare bool) (took time.Duration, tree map[string]string, err error) {
	ref, err := p.origin.ref(ctx, c)
	if err != nil {
		return 0, nil, err
	}
	fs, err := newScratch(ctx, p.memory)
	if err != nil {
		return 0, nil, err
	}
	defer func() { err = errors.Join(err, fs.remove()) }()
	n, err := startNode(ctx, p.o, fs.Dir, system, p.origin.links[c.link])
	if err != nil {
		return 0, nil, err
	}
	defer func() { err = errors.Join(err, n.close()) }()
	if took, err = p.measure(ctx, n, c, system, ref); err != nil {
		return 0, nil, err
	}
	if compare {
		tree, err = n.tree(ctx, ref)
	}
	return took, tree, err
}

// measure pulls once and files all metrics.
func (p *puller) measure(ctx context.Context, n *node, c pullCase, system, ref string) (took time.Duration, err error) {
	add := func(metric, unit string, sample float64) { p.report.Add(c.String(), system, metric, unit, sample) }
	if err := syncFS(n.dir); err != nil { // what starting left is not the pull's
		return 0, err
	}
	before, err := p.usage(ctx, n)
	if err != nil {
		return 0, err
	}
	if c.image == smallFiles {
		var longest time.Duration
		took, longest, err = n.pullBeside(ctx, ref)
		add("prepare_wait", "ms", ms(longest))
	} else {
		took, err = n.pull(ctx, ref)
	}
	if err != nil {
		return 0, err
	}
	after, err := p.usage(ctx, n)
	if err != nil {
		return 0, err
	}
	start := time.Now()
	if err := syncFS(n.dir); err != nil {
		return 0, err
	}
	synced := took + time.Since(start)
	disk, err := deviceWritten(n.dir)
	if err != nil {
		return 0, err
	}
	add("pull_time", "s", took.Seconds())
	add("pull_time_synced", "s", synced.Seconds())
	add("cpu_seconds", "s", after.cpu-before.cpu)
	add("bytes_fetched", "bytes", after.fetched-before.fetched)
	add("bytes_written", "bytes", disk-before.written)
	addFetching(before.fetching, after.fetching, link.Named()[c.link], add)
	if err := addMemory(n, add); err != nil {
		return 0, err
	}
	if p.o.Image != "" && c.image == foreignName(p.o.Image) { // whether it listens, and on what, is its own affair
		return took, nil
	}
	started, err := n.run(ctx, ref)
	if err != nil {
		return 0, err
	}
	add("ready_time", "s", (took + started).Seconds())
	return took, nil
}

// usage of a system at one moment.
type usage struct {
	cpu, fetched, written float64
	fetching              fetching // zero of who does not tell
}

func (p *puller) usage(ctx context.Context, n *node) (u usage, err error) {
	pids, err := n.processes()
	if err != nil {
		return u, err
	}
	if u.cpu, err = cpuSeconds(pids); err != nil {
		return u, err
	}
	if u.fetched, err = p.origin.sent(); err != nil {
		return u, err
	}
	if n.fetched != nil {
		if u.fetching, err = n.fetched(ctx); err != nil {
			return u, err
		}
	}
	u.written, err = deviceWritten(n.dir)
	return u, err
}

// addMemory files the peak memory of the process that does the work, and of containerd beside it.
func addMemory(n *node, add func(metric, unit string, sample float64)) error {
	pids, err := n.processes()
	if err != nil {
		return err
	}
	for i, metric := range []string{"peak_rss", "peak_rss_containerd"}[:len(pids)] {
		resident, err := peakRSS(pids[i])
		if err != nil {
			return err
		}
		add(metric, "bytes", resident)
	}
	return nil
}
