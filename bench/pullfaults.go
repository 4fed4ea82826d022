package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/hearth-serverless/hearth/bench/faults"
	"github.com/hearth-serverless/hearth/bench/images"
)

// faultSuite pulls from a registry that fails, and into a node that does, one fault after the other into the same node. Metrics of a
// case: pull_time, until the pull came to its end, and outcome, 1 if that end was the one that the case's note asks for: within the
// deadline, right with the tree that an honest pull makes, or refused in an error that names a layer; and nothing is left over once
// the image is removed: no staged or kept layer, no mount, no open file of nodeagent. A wrong outcome of hearth's is an error.
func faultSuite(ctx context.Context, o *Options, r *Report) (err error) {
	if err := o.checkFaults(); err != nil {
		return err
	}
	f := &faulter{o: o, report: r, started: time.Now(), trees: map[string]map[string]string{}, image: "python", other: "java"}
	if o.Quick {
		f.image = "node"
	}
	if len(o.Images) > 0 {
		f.image = o.Images[0]
	}
	if f.image == f.other {
		f.other = "python"
	}
	systems := o.Systems
	if len(systems) == 0 {
		systems = []string{"hearth", "containerd"}
		if o.Quick {
			systems = systems[:1]
		}
	}
	var end func() error
	if f.memory, end, err = memoryDir(os.TempDir()); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, end()) }()
	if f.origin, err = startOrigin(ctx, o, f.memory); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.origin.stop()) }()
	for _, image := range []string{f.image, f.other} {
		if f.trees[image], err = f.honest(ctx, image); err != nil {
			return fmt.Errorf("pull %s from an honest registry: %w", image, err)
		}
	}
	var wrong []string
	for _, system := range systems {
		these, err := f.suffer(ctx, system)
		if err != nil {
			return fmt.Errorf("%s: %w", system, err)
		}
		if system == "hearth" {
			wrong = these
		}
	}
	if len(wrong) > 0 {
		return fmt.Errorf("hearth ended wrongly in %s", strings.Join(wrong, ", "))
	}
	return nil
}

// faulter is a run of the suite.
type faulter struct {
	o       *Options
	report  *Report
	memory  string
	origin  *origin
	started time.Time
	// image is pulled in all cases, other beside it where two are.
	image, other string
	trees        map[string]map[string]string // of each image
}

// faultCase is one thing that goes wrong.
type faultCase struct {
	name, about string
	deadline    time.Duration
	// run lets it go wrong, and returns how long each pull took and what is not as it should be.
	run func(ctx context.Context, v *victim) ([]time.Duration, error)
	// hearthOnly: it happens to a part that others do not have, or that nobody starts again.
	hearthOnly bool
}

// cases in the order in which they are run. The first is without a fault, and tells the others how long a pull takes. What must be
// refused comes last: nodeagent holds on to the layers of such a pull for a while, and then others have to wait.
func (f *faulter) cases() []faultCase {
	cases := []faultCase{{name: "none", about: "nothing is wrong; the pull must be right", deadline: time.Minute, run: withFault(faults.Fault{})}}
	var refused []faultCase
	for _, fault := range faults.All() {
		c := faultCase{name: fault.Name, about: fault.About + "; " + wanted(fault.Want), deadline: time.Minute, run: withFault(fault)}
		if fault.Want == faults.Right {
			cases = append(cases, c)
		} else {
			refused = append(refused, c)
		}
	}
	kills := f.o.rounds(2, 20)
	cases = append(cases,
		faultCase{name: "registry-down", about: "the registry is gone; a container of an image that is present must start", deadline: 30 * time.Second, run: registryDown},
		faultCase{name: "shared-layers", about: "two images with a layer in common are pulled at once; each layer must come once", deadline: 2 * time.Minute, run: sharedLayers},
		faultCase{name: "disk-full", about: "the disk is full in mid-pull; that must be said, and the next pull be right", deadline: 2 * time.Minute, run: diskFull},
	)
	for which, daemon := range []string{"nodeagent", "containerd"} {
		cases = append(cases, faultCase{
			name: "kill-" + daemon, deadline: time.Minute, run: killing(which, kills), hearthOnly: true,
			about: fmt.Sprintf("kill -9 of %s at %d random moments; the pulls after it must come to be right", daemon, kills),
		})
	}
	return append(cases, refused...)
}

// Faults of pull-faults by name.
func Faults() []string {
	f := &faulter{o: &Options{}}
	var names []string
	for _, c := range f.cases() {
		names = append(names, c.name)
	}
	return names
}

// chosen says whether a case is run. The one without a fault always is.
func (f *faulter) chosen(name string) bool {
	return len(f.o.Faults) == 0 || name == "none" || slices.Contains(f.o.Faults, name)
}

// checkFaults refuses names that no case has.
func (o *Options) checkFaults() error {
	for _, name := range o.Faults {
		if !slices.Contains(Faults(), name) {
			return fmt.Errorf("there is no fault %q: choose of %s", name, strings.Join(Faults(), ", "))
		}
	}
	return nil
}

func wanted(w faults.Want) string {
	switch w {
	case faults.Refused:
		return "that must be refused"
	case faults.Either:
		return "the pull must be right, or refused"
	}
	return "the pull must be right"
}

// suffer runs all cases with one system and returns the names of those that ended wrongly. After such a case it takes a new node.
func (f *faulter) suffer(ctx context.Context, system string) (wrong []string, err error) {
	v := &victim{faulter: f, system: system}
	defer func() { err = errors.Join(err, v.end()) }()
	for _, c := range f.cases() {
		if c.hearthOnly && system != "hearth" || !f.chosen(c.name) {
			continue
		}
		if f.o.Quick && time.Since(f.started) > quickTime {
			f.report.note(fmt.Sprintf("%s: %s was left out, for lack of time", c.name, system))
			continue
		}
		if err := v.begin(ctx); err != nil {
			return wrong, err
		}
		f.report.note(fmt.Sprintf("%s: %s; deadline %v", c.name, c.about, c.deadline))
		bounded, cancel := context.WithTimeout(ctx, time.Duration(f.o.rounds(2, 20))*2*(c.deadline+settleTime))
		v.deadline = c.deadline
		took, fault := c.run(bounded, v)
		if fault == nil {
			fault = v.clean(bounded)
		}
		cancel()
		if ctx.Err() != nil {
			return wrong, ctx.Err()
		}
		f.file(c, system, took, fault)
		if fault != nil {
			wrong = append(wrong, c.name)
			if err := v.end(); err != nil {
				return wrong, err
			}
		}
	}
	return wrong, nil
}

// file puts a case's end into the report.
func (f *faulter) file(c faultCase, system string, took []time.Duration, fault error) {
	outcome := 1.0
	if fault != nil {
		outcome = 0
		f.report.note(fmt.Sprintf("%s: %s: wrong: %v", c.name, system, fault))
	}
	var times []string
	for _, t := range took {
		f.report.Add(c.name, system, "pull_time", "s", t.Seconds())
		times = append(times, fmt.Sprintf("%.2f s", t.Seconds()))
	}
	f.report.Add(c.name, system, "outcome", outcomeUnit, outcome)
	f.o.say("%-18s %-11s outcome %.0f  %s", c.name, system, outcome, strings.Join(times, ", "))
}

// honest pulls an image with containerd's defaults, and returns its tree.
func (f *faulter) honest(ctx context.Context, image string) (tree map[string]string, err error) {
	fs, err := newScratch(ctx, f.memory)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, fs.remove()) }()
	n, err := startNode(ctx, f.o, fs.Dir, "containerd", f.origin.address)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, n.close()) }()
	ref, err := f.origin.ref(ctx, pullCase{image, string(images.Gzip), "loopback"})
	if err != nil {
		return nil, err
	}
	if _, err := n.pull(ctx, ref); err != nil {
		return nil, err
	}
	return n.tree(ctx, ref)
}

// front is a failing registry that listens.
type front struct {
	*faults.Registry
	address string
	stop    func()
}

// serve starts a registry that fails with the layers of the suite's images.
func (f *faulter) serve(ctx context.Context, fault faults.Fault) (*front, error) {
	sizes := map[string]int64{}
	for _, image := range []string{f.image, f.other} {
		layers, err := f.layers(ctx, image)
		if err != nil {
			return nil, err
		}
		for _, l := range layers {
			sizes[l.Digest] = l.Bytes
		}
	}
	listener, err := (&net.ListenConfig{}).Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("listen for a failing registry: %w", err)
	}
	r := &front{Registry: faults.New(f.origin.address, sizes, fault), address: listener.Addr().String()}
	server := &http.Server{Handler: r, ErrorLog: log.New(io.Discard, "", 0), ReadHeaderTimeout: time.Minute}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = server.Serve(listener) // it ends when it is closed
	}()
	r.stop = func() {
		_ = server.Close()
		<-done
	}
	return r, nil
}

func (f *faulter) layers(ctx context.Context, image string) ([]images.Layer, error) {
	layout, err := f.o.layout(ctx, image)
	if err != nil {
		return nil, err
	}
	return images.Layers(layout)
}

// ref of an image at a failing registry. The image was pushed when its honest tree was read.
func (f *faulter) ref(r *front, image string) string {
	return r.address + "/" + f.origin.refs[image+"-"+string(images.Gzip)]
}
