package bench

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"connectrpc.com/connect"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/gateway"
)

// handoffSuite measures how long a Function that has no Instance takes to answer when one is warm, in cases RUNTIME/DEGREE/N of N
// starts at once: from a sandbox of the pool, from a Runtime that is booted, or from a Revision that is frozen. Each start is of a
// Function of its own. The client has its connections to the gateway open, as one that is in use has. Systems and metrics:
//
//   - hearth, last_byte: from the request at the gateway to the last byte of its answer; phase_*: the parts of it, as the daemons
//     tell them.
//   - cri, last_byte: a plain pod of the same Function in a containerd as it comes, image present, from RunPodSandbox to the last
//     byte, asked at its own address.
//   - process, last_byte (image/sandbox/1): the same program started bare, without any container.
//
// Every start is checked: the Instance that answers is the one that was warm, or frozen, before. A case that cannot be measured is
// an error that names what is missing; the others are measured all the same.
func handoffSuite(ctx context.Context, o *Options, r *Report) (err error) {
	cases, err := o.handoffCases()
	if err != nil {
		return err
	}
	memory, end, err := memoryDir(os.TempDir())
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, end()) }()
	r.note("cri: containerd as it comes, overlayfs, runc; the pod of a python, java or node case runs the sample image of that name, " +
		"which imports and answers what the handler does; that of a native case the go image, whose program is another")
	r.note("hearth's phases overlap, and are told by the daemons themselves")
	clock := newQuickClock(o, len(cases))
	var failed []error
	for len(cases) > 0 && ctx.Err() == nil {
		alike := 1
		for alike < len(cases) && cases[alike].n == cases[0].n {
			alike++
		}
		err := withHandoff(ctx, o, r, memory, cases[:alike], func(h *handoff) {
			for _, c := range cases[:alike] {
				if err := h.measure(ctx, c, clock); err != nil {
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
	r.handoffBounds()
	return errors.Join(append(failed, ctx.Err())...)
}

// quickClock shares the time of a quick run between its cases. Each makes one round at least.
type quickClock struct {
	quick bool
	began time.Time
	cases int // that are not done yet
}

func newQuickClock(o *Options, cases int) *quickClock { return &quickClock{o.Quick, time.Now(), cases} }

// share is when the next case has had its share.
func (q *quickClock) share() time.Time {
	left := time.Until(q.began.Add(quickTime)) / time.Duration(q.cases)
	q.cases--
	return time.Now().Add(left)
}

// handoff is a deployment with a pool, and a containerd without Hearth.
type handoff struct {
	o      *Options
	report *Report
	stack  *machineStack
	pods   *podNode
	bare   *bareProgram
	client *http.Client
	// plain are the references of images that the pods' node has, by name.
	plain map[string]string
}

// withHandoff brings up what the cases need, all of the same number at once.
func withHandoff(ctx context.Context, o *Options, r *Report, memory string, cases []handoffCase, run func(*handoff)) (err error) {
	fs, err := newScratch(ctx, memory)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, fs.remove()) }()
	pool := -1
	if i := slices.IndexFunc(cases, func(c handoffCase) bool { return c.degree == fromSandbox }); i >= 0 {
		pool = cases[i].n
	}
	st, err := startStack(ctx, o, fs.Dir, stackOptions{registry: true, pool: pool})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, st.stop()) }()
	dir := filepath.Join(fs.Dir, "plain")
	if err := os.Mkdir(dir, 0o711); err != nil {
		return fmt.Errorf("make a folder for plain pods: %w", err)
	}
	pods, err := startPodNode(ctx, o, dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, pods.end(ctx)) }()
	h := &handoff{o: o, report: r, stack: st, pods: pods, plain: map[string]string{}}
	h.client = &http.Client{Transport: &http.Transport{DisableCompression: true, MaxIdleConnsPerHost: mostAtOnce}}
	defer h.client.CloseIdleConnections()
	if slices.Contains(cases, handoffCase{ofImage, fromSandbox, 1}) {
		layout, err := o.layout(ctx, o.image())
		if err != nil {
			return err
		}
		if h.bare, err = unpackBare(ctx, layout, fs.Dir); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, h.bare.remove()) }()
	}
	run(h)
	return nil
}

// image that the cases of images run.
func (o *Options) image() string {
	if o.Function != "" {
		return o.Function
	}
	return "go"
}

// handoffRounds of a case: many where one is soon done.
func (o *Options) handoffRounds(c handoffCase) int {
	switch {
	case c.n == 1:
		return o.rounds(4, 20)
	case c.n <= 10:
		return o.rounds(2, 5)
	}
	return o.rounds(1, 3)
}

// measure takes all samples of a case.
func (h *handoff) measure(ctx context.Context, c handoffCase, clock *quickClock) (err error) {
	end := clock.share()
	functions, err := h.deploy(ctx, c)
	defer func() {
		clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute+time.Duration(c.n)*time.Second)
		defer cancel()
		err = errors.Join(err, h.retire(clean, c, functions))
	}()
	if err != nil {
		return err
	}
	ref, err := h.plainImage(ctx, c.plain(h.o.image()))
	if err != nil {
		return err
	}
	kinds := []func() error{
		func() error { return h.hearth(ctx, c, functions) },
		func() error { return h.cri(ctx, c, ref) },
	}
	if c == (handoffCase{ofImage, fromSandbox, 1}) {
		kinds = append(kinds, func() error { return h.process(ctx, c) })
	}
	for round := range h.o.handoffRounds(c) {
		for i := range kinds {
			if err := errors.Join(rest(ctx), kinds[(i+round)%len(kinds)]()); err != nil {
				return fmt.Errorf("round %d: %w", round+1, err)
			}
		}
		if clock.quick && time.Now().After(end) {
			break
		}
	}
	h.tell(c)
	return nil
}

// tell says what came out, for who waits.
func (h *handoff) tell(c handoffCase) {
	for _, system := range []string{"hearth", "cri", "process"} {
		if row := h.report.Row(c.String(), system, lastByte); row != nil {
			h.o.say("%-20s %-8s p50 %s ms, p99 %s ms of %d", c, system, number(row.P50), number(row.P99), row.N)
		}
	}
}

// errMissing says that this build cannot do what is to be measured.
var errMissing = errors.New("this build cannot do it yet")

// lastByte is the metric that systems are compared by.
const lastByte = "last_byte"

func (h *handoff) cri(ctx context.Context, c handoffCase, ref string) error {
	took, err := h.pods.pods(ctx, ref, c.n)
	if err != nil {
		return fmt.Errorf("plain pods: %w", err)
	}
	for _, t := range took {
		h.report.Add(c.String(), "cri", lastByte, "ms", ms(t))
	}
	return nil
}

func (h *handoff) process(ctx context.Context, c handoffCase) error {
	took, err := h.bare.firstByte(ctx)
	if err != nil {
		return fmt.Errorf("start the bare process: %w", err)
	}
	h.report.Add(c.String(), "process", lastByte, "ms", ms(took))
	return nil
}

// hearth takes the Functions to where the case begins, and starts them: all at once, or one after the other.
func (h *handoff) hearth(ctx context.Context, c handoffCase, functions []string) error {
	warm, err := h.begin(ctx, c, functions)
	if err != nil {
		return err
	}
	if err := rest(ctx); err != nil {
		return err
	}
	if c.degree == fromRevision { // it may have been thawed or discarded while the machine came to rest
		if warm, err = h.frozen(ctx, functions); err != nil {
			return err
		}
	}
	openConnections(ctx, h.client, h.stack.url("no-such-function"), c.n)
	for at := 0; at < len(functions); at += c.n {
		if err := h.start(ctx, c, functions[at:at+c.n]); err != nil {
			return err
		}
	}
	return h.servedBy(ctx, c, functions, warm)
}

// openConnections has a client connect to the gateway, which answers for itself that it knows no such Function.
func openConnections(ctx context.Context, client *http.Client, url string, n int) {
	var all sync.WaitGroup
	for range n {
		all.Go(func() { _, _ = ask(ctx, client, url, nil) })
	}
	all.Wait()
}

// start asks Functions at once, and files what their answers took.
func (h *handoff) start(ctx context.Context, c handoffCase, functions []string) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	answers, errs := make([]answer, len(functions)), make([]error, len(functions))
	var all sync.WaitGroup
	for i, f := range functions {
		all.Go(func() {
			answers[i], errs[i] = ask(ctx, h.client, h.stack.url(f), http.Header{gateway.TraceHeader: {"1"}})
		})
	}
	all.Wait()
	if err := errors.Join(errs...); err != nil {
		return err
	}
	for _, a := range answers {
		h.report.Add(c.String(), "hearth", lastByte, "ms", ms(a.last))
		phases, err := gateway.ParseTiming(a.header.Values("Server-Timing"))
		if err != nil {
			return err
		}
		for _, p := range phases {
			h.report.Add(c.String(), "hearth", "phase_"+p.Name, "ms", ms(p.Duration))
		}
	}
	return nil
}

// begin takes Functions to where the case's start begins, and returns the Instances that may serve then.
func (h *handoff) begin(ctx context.Context, c handoffCase, functions []string) (map[string]bool, error) {
	if c.degree == fromRevision {
		return h.freeze(ctx, functions)
	}
	for _, f := range functions {
		_, err := h.stack.allocation.Release(ctx, connect.NewRequest(&hearthv1.ReleaseRequest{Function: f, Wait: true}))
		if err != nil {
			return nil, fmt.Errorf("release %s: %w", f, err)
		}
	}
	if c.runtime == ofImage { // a snapshot of the image is prepared for each, as before its first request
		for _, f := range functions {
			if err := h.stack.prepare(ctx, f); err != nil {
				return nil, err
			}
		}
	}
	return h.awaitWarm(ctx, c)
}

// booted is the Runtime in the case's warm Instances; empty for sandboxes.
func (c handoffCase) booted() string {
	if c.degree == fromRuntime {
		return c.runtime
	}
	return ""
}

// patience is how long the pool may take to have the case's Instances ready.
func (c handoffCase) patience() time.Duration { return time.Minute + time.Duration(c.n)*3*time.Second }

// awaitWarm waits until as many Instances are warm as the case starts at once, and nothing else is going on.
func (h *handoff) awaitWarm(ctx context.Context, c handoffCase) (warm map[string]bool, err error) {
	err = h.await(ctx, c.patience(), func(all []*hearthv1.Instance) (bool, error) {
		warm = map[string]bool{}
		for _, i := range all {
			if i.GetState() != hearthv1.State_STATE_WARM {
				return false, nil
			}
			if i.GetRuntime() == c.booted() {
				warm[i.GetId()] = true
			}
		}
		return len(warm) >= c.n, nil
	})
	if err != nil {
		return nil, fmt.Errorf("await %d warm instances (runtime %q): %w", c.n, c.booted(), err)
	}
	return warm, nil
}

// freeze has each Function served once, if nothing of it is there, and waits until its only Instance is frozen.
func (h *handoff) freeze(ctx context.Context, functions []string) (map[string]bool, error) {
	there, err := h.stack.instances(ctx, "")
	if err != nil {
		return nil, err
	}
	for _, f := range functions {
		if slices.ContainsFunc(there, func(i *hearthv1.Instance) bool { return i.GetFunction() == f }) {
			continue
		}
		if _, err := ask(ctx, h.client, h.stack.url(f), nil); err != nil {
			return nil, err
		}
	}
	err = h.await(ctx, time.Minute, func(all []*hearthv1.Instance) (bool, error) {
		held := map[string]hearthv1.State{}
		for _, i := range all {
			held[i.GetFunction()] = i.GetState()
		}
		for _, f := range functions {
			if held[f] == hearthv1.State_STATE_UNSPECIFIED {
				return false, fmt.Errorf("%w: the instance of %s that nobody asked any more is discarded and not frozen", errMissing, f)
			}
			if held[f] != hearthv1.State_STATE_FROZEN {
				return false, nil
			}
		}
		return true, nil
	})
	if err != nil {
		return nil, fmt.Errorf("await frozen instances: %w", err)
	}
	return h.frozen(ctx, functions)
}

// frozen are the Instances of Functions, each of which must have one, and that one frozen.
func (h *handoff) frozen(ctx context.Context, functions []string) (map[string]bool, error) {
	all, err := h.stack.instances(ctx, "")
	if err != nil {
		return nil, err
	}
	frozen := map[string]bool{}
	for _, f := range functions {
		of := slices.DeleteFunc(slices.Clone(all), func(i *hearthv1.Instance) bool { return i.GetFunction() != f })
		if len(of) != 1 || of[0].GetState() != hearthv1.State_STATE_FROZEN {
			return nil, fmt.Errorf("%s has not one frozen instance, but %v", f, of)
		}
		frozen[of[0].GetId()] = true
	}
	return frozen, nil
}

// servedBy checks that the Functions were served by Instances that were warm before, each by one of its own.
func (h *handoff) servedBy(ctx context.Context, c handoffCase, functions []string, warm map[string]bool) error {
	all, err := h.stack.instances(ctx, "")
	if err != nil {
		return err
	}
	for _, f := range functions {
		by := 0
		for _, i := range all {
			if i.GetFunction() != f {
				continue
			}
			by++
			if !warm[i.GetId()] {
				return fmt.Errorf("%s was served by instance %s, which was not there before (a miss of the pool): no sample of %s", f, i.GetId(), c)
			}
		}
		if by != 1 {
			return fmt.Errorf("%s has %d instances after one request", f, by)
		}
	}
	return nil
}

// await looks at all Instances until they are as wanted.
func (h *handoff) await(ctx context.Context, patience time.Duration, wanted func([]*hearthv1.Instance) (bool, error)) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for {
		all, err := h.stack.instances(ctx, "")
		if err != nil {
			return err
		}
		if ok, err := wanted(all); ok || err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w: the instances are %v", ctx.Err(), all)
		case <-time.After(20 * time.Millisecond):
		}
	}
}
