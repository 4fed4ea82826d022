package bench

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/hearth-serverless/hearth/bench/images"
	"github.com/hearth-serverless/hearth/gateway"
)

// kubernetesSuite measures on a cluster how long a Function at zero takes to answer its first request, in cases RUNTIME/DEGREE, or
// RUNTIME/DEGREE/N for N Functions that are asked at once. Systems and metrics:
//
//   - hearth, last_byte: from the request at the gateway to the last byte of its answer; phase_*: the parts of it.
//   - deployment, last_byte: the same Function as a plain Deployment, image present on the nodes, from its being scaled to one to the
//     last byte, asked at its pod's own address as soon as that has one.
//
// Both are asked from the machine that this runs on, and neither waits for kubectl: it speaks to the API server over connections that
// are open.
func kubernetesSuite(ctx context.Context, o *Options, r *Report) error {
	cases, err := o.kubernetesCases()
	if err != nil {
		return err
	}
	return withCluster(ctx, o, func(k *cluster) error {
		r.note("deployment: the sample image of the runtime's name, which imports and answers what the handler does; that of a native case is the go image")
		clock := newQuickClock(o, len(cases))
		var failed []error
		for _, c := range cases {
			if ctx.Err() != nil {
				break
			}
			s := &kubernetesStarts{cluster: k, report: r, kase: c}
			if err := s.measure(ctx, clock.share()); err != nil {
				o.say("%s cannot be measured: %v", c, err)
				failed = append(failed, fmt.Errorf("case %s: %w", c, err))
			}
		}
		r.kubernetesBounds()
		return errors.Join(append(failed, ctx.Err())...)
	})
}

// kubernetesCase is what is started, from which degree of warmth, and how many at once.
type kubernetesCase struct{ handoffCase }

func (c kubernetesCase) String() string {
	if c.n == 1 {
		return c.runtime + "/" + c.degree
	}
	return c.handoffCase.String()
}

func parseKubernetesCase(s string) (kubernetesCase, error) {
	if strings.Count(s, "/") == 1 {
		s += "/1"
	}
	c, err := parseHandoffCase(s)
	if err == nil && c.degree == fromRevision {
		err = fmt.Errorf("case %q: on a cluster starts are from a booted runtime or a sandbox", s)
	}
	return kubernetesCase{c}, err
}

// kubernetesCases are those that were asked for, or else the usual ones.
func (o *Options) kubernetesCases() (cases []kubernetesCase, err error) {
	names := o.Cases
	if len(names) == 0 {
		names = []string{"python/runtime", "node/runtime", "native/runtime", "image/sandbox", "native/runtime/20"}
		if !o.Quick {
			names = append(names, "python/runtime/20", "node/runtime/20")
		}
	}
	for _, name := range names {
		c, err := parseKubernetesCase(name)
		if err != nil {
			return nil, err
		}
		cases = append(cases, c)
	}
	slices.SortStableFunc(cases, func(a, b kubernetesCase) int { return a.n - b.n }) // what one takes alone is known before many
	return slices.Compact(cases), nil
}

// kubernetesStarts is one case on a cluster.
type kubernetesStarts struct {
	*cluster
	report    *Report
	kase      kubernetesCase
	functions []string
}

// measure takes all samples of the case, until end if the run is a quick one.
func (s *kubernetesStarts) measure(ctx context.Context, end time.Time) (err error) {
	for i := range s.kase.n {
		s.functions = append(s.functions, fmt.Sprintf("bench-%s-%d", s.kase.runtime, i))
	}
	defer func() {
		clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Minute)
		defer cancel()
		err = errors.Join(err, s.retire(clean))
	}()
	if err := s.deploy(ctx); err != nil {
		return err
	}
	kinds := []func(context.Context) error{s.hearth}
	if s.kase.n == 1 {
		kinds = append(kinds, s.deployment)
	}
	for round := range s.o.handoffRounds(s.kase.handoffCase) {
		for i := range kinds {
			if err := errors.Join(rest(ctx), kinds[(i+round)%len(kinds)](ctx)); err != nil {
				return fmt.Errorf("round %d: %w", round+1, err)
			}
		}
		if s.o.Quick && time.Now().After(end) {
			break
		}
	}
	return nil
}

// hearth asks every Function of the case at once, when none has an Instance and enough are warm.
func (s *kubernetesStarts) hearth(ctx context.Context) error {
	if err := s.awaitZero(ctx); err != nil {
		return err
	}
	if err := rest(ctx); err != nil {
		return err
	}
	openConnections(ctx, s.client, s.gateway+"/fn/no-such-function/", s.kase.n)
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	answers, errs := make([]answer, s.kase.n), make([]error, s.kase.n)
	var all sync.WaitGroup
	for i, f := range s.functions {
		all.Go(func() {
			answers[i], errs[i] = ask(ctx, s.client, s.gateway+"/fn/"+f+"/", http.Header{gateway.TraceHeader: {"1"}})
		})
	}
	all.Wait()
	if err := errors.Join(errs...); err != nil {
		return err
	}
	for _, a := range answers {
		phases, err := gateway.ParseTiming(a.header.Values("Server-Timing"))
		if err != nil {
			return err
		}
		if !slices.ContainsFunc(phases, func(p gateway.Phase) bool { return p.Name == "allocate" }) {
			s.o.say("%s: an Instance of before served still, which is no start and is not counted", s.kase)
			continue
		}
		s.report.Add(s.kase.String(), "hearth", lastByte, "ms", ms(a.last))
		for _, p := range phases {
			s.report.Add(s.kase.String(), "hearth", "phase_"+p.Name, "ms", ms(p.Duration))
		}
	}
	return nil
}

// deployment scales the plain Deployment from none to one, asks it, and scales it back.
func (s *kubernetesStarts) deployment(ctx context.Context) (err error) {
	name := "bench-" + s.kase.runtime
	defer func() {
		back, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
		defer cancel()
		err = errors.Join(err, s.scale(back, name, 0), s.awaitNoPods(back, name))
	}()
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	begun := time.Now()
	if err := s.scale(ctx, name, 1); err != nil {
		return err
	}
	ip, err := s.podAddress(ctx, name)
	if err != nil {
		return err
	}
	address := ip + ":" + strconv.Itoa(plainPort)
	if err := awaitListener(ctx, address, awaitPause); err != nil {
		return err
	}
	if _, err := ask(ctx, s.client, "http://"+address+"/", nil); err != nil {
		return err
	}
	s.report.Add(s.kase.String(), "deployment", lastByte, "ms", ms(time.Since(begun)))
	return nil
}

const (
	plainPort = 8080
	// deploymentGain is by how much a start must beat a Deployment that is scaled to one.
	deploymentGain = 10
	// manyLimit and manyFactor bound the last of many starts at once: in ms, and of the median of one alone.
	manyLimit, manyFactor = 250, 5
)

// kubernetesBounds says of what was measured whether it holds.
func (r *Report) kubernetesBounds() {
	for _, row := range slices.Clone(r.Rows) {
		c, err := parseKubernetesCase(row.Case)
		if err != nil || row.System != "hearth" || row.Metric != lastByte || c.degree != fromRuntime {
			continue
		}
		if c.n == 1 {
			r.bound(row.Case, "p50", "ms", row.P50, 40)
			r.bound(row.Case, "p99", "ms", row.P99, 120)
			if plain := r.Row(row.Case, "deployment", lastByte); plain != nil {
				r.bound(row.Case, "p50 below that of a deployment", timesUnit, plain.P50/row.P50, deploymentGain)
			}
			continue
		}
		r.bound(row.Case, "the last", "ms", row.Max, manyLimit)
		alone := kubernetesCase{handoffCase{c.runtime, c.degree, 1}}
		if serial := r.Row(alone.String(), "hearth", lastByte); serial != nil {
			r.bound(row.Case, fmt.Sprintf("the last, of %d times the p50 of %s", manyFactor, alone), "ms", row.Max, manyFactor*serial.P50)
		}
	}
}

// deploy applies the case's Runtime with a WarmPool, its Functions, and the Deployment that they are compared with.
func (s *kubernetesStarts) deploy(ctx context.Context) error {
	s.o.say("%s: deploying %d functions", s.kase, s.kase.n)
	spec := map[string]any{}
	pool := map[string]any{"size": s.kase.n}
	switch {
	case s.kase.runtime == ofImage:
		ref, err := s.push(ctx, s.o.image())
		if err != nil {
			return err
		}
		spec["image"] = ref
		pool["images"] = []string{ref}
	default:
		var err error
		if spec, err = s.deployCode(ctx); err != nil {
			return err
		}
		pool["runtime"] = s.kase.runtime
	}
	spec["scaling"] = map[string]any{"max": 1, "window": "1s", "grace": "0s", "frozen": 0}
	objects := []map[string]any{object("WarmPool", "bench", pool)}
	for _, f := range s.functions {
		objects = append(objects, object("Function", f, spec))
	}
	if err := s.apply(ctx, objects...); err != nil {
		return err
	}
	for _, f := range s.functions {
		if err := s.run(ctx, nil, s.kubectl, "wait", "-n", namespace, "--for=condition=Ready", "--timeout=120s", "function/"+f); err != nil {
			return err
		}
	}
	if s.kase.n > 1 {
		return nil
	}
	return s.deployPlain(ctx)
}

// deployCode applies the Runtime and deploys the sample handler as a user does, by `hearth`, and returns what it became.
func (s *kubernetesStarts) deployCode(ctx context.Context) (map[string]any, error) {
	dir, handler, err := images.Handler(ctx, s.o.images(), s.kase.runtime)
	if err != nil {
		return nil, err
	}
	ref, err := s.push(ctx, "runtime-"+s.kase.runtime)
	if err != nil {
		return nil, err
	}
	spec := map[string]any{"image": ref}
	if libraries := preloads()[s.kase.runtime]; libraries != "" {
		spec["preload"] = strings.Split(libraries, ",")
	}
	if err := s.apply(ctx, object("Runtime", s.kase.runtime, spec)); err != nil {
		return nil, err
	}
	err = s.run(ctx, nil, filepath.Join(s.o.Bin, "hearth"), "deploy", s.functions[0], "--namespace", namespace,
		"--runtime", s.kase.runtime, "--handler", handler, "--registry", s.o.Registry, dir)
	if err != nil {
		return nil, err
	}
	var made struct {
		Spec map[string]any `json:"spec"`
	}
	err = s.get(ctx, "/apis/hearth.dev/v1alpha1/namespaces/"+namespace+"/functions/"+s.functions[0], &made)
	return made.Spec, err
}

// deployPlain applies the Deployment, with no replicas, and has its image on the nodes: it runs once before it is measured.
func (s *kubernetesStarts) deployPlain(ctx context.Context) error {
	ref, err := s.push(ctx, s.kase.plain(s.o.image()))
	if err != nil {
		return err
	}
	name := "bench-" + s.kase.runtime
	labels := map[string]any{"app": name}
	deployment := map[string]any{
		"apiVersion": "apps/v1", "kind": "Deployment", "metadata": map[string]any{"name": name, "namespace": plainNamespace},
		"spec": map[string]any{
			"replicas": 0, "selector": map[string]any{"matchLabels": labels},
			"template": map[string]any{"metadata": map[string]any{"labels": labels}, "spec": map[string]any{
				"terminationGracePeriodSeconds": 0, "enableServiceLinks": false, "automountServiceAccountToken": false,
				"containers": []any{map[string]any{
					"name": "function", "image": ref, "imagePullPolicy": "IfNotPresent",
					"env": []any{map[string]any{"name": "PORT", "value": strconv.Itoa(plainPort)}},
				}},
			}},
		},
	}
	place := map[string]any{"apiVersion": "v1", "kind": "Namespace", "metadata": map[string]any{"name": plainNamespace}}
	if err := s.apply(ctx, place, deployment); err != nil {
		return err
	}
	return s.prefetchPlain(ctx, name, ref)
}

// prefetchPlain has the image on every node, by a DaemonSet that runs it once.
func (s *kubernetesStarts) prefetchPlain(ctx context.Context, name, ref string) error {
	labels := map[string]any{"app": name + "-prefetch"}
	daemons := map[string]any{
		"apiVersion": "apps/v1", "kind": "DaemonSet", "metadata": map[string]any{"name": name + "-prefetch", "namespace": plainNamespace},
		"spec": map[string]any{
			"selector": map[string]any{"matchLabels": labels},
			"template": map[string]any{"metadata": map[string]any{"labels": labels}, "spec": map[string]any{
				"terminationGracePeriodSeconds": 0,
				"containers":                    []any{map[string]any{"name": "function", "image": ref, "imagePullPolicy": "IfNotPresent"}},
			}},
		},
	}
	if err := s.apply(ctx, daemons); err != nil {
		return err
	}
	return errors.Join(
		s.run(ctx, nil, s.kubectl, "rollout", "status", "-n", plainNamespace, "daemonset/"+name+"-prefetch", "--timeout=300s"),
		s.run(context.WithoutCancel(ctx), nil, s.kubectl, "delete", "-n", plainNamespace, "daemonset/"+name+"-prefetch", "--wait=true", "--timeout=60s"))
}

// retire deletes all that the case made.
func (s *kubernetesStarts) retire(ctx context.Context) error {
	args := []string{s.kubectl, "delete", "-n", namespace, "--ignore-not-found", "--timeout=110s", "warmpool/bench"}
	for _, f := range s.functions {
		args = append(args, "function/"+f)
	}
	if s.kase.runtime != ofImage {
		args = append(args, "runtime/"+s.kase.runtime)
	}
	return errors.Join(s.run(ctx, nil, args...),
		s.run(ctx, nil, s.kubectl, "delete", "namespace", plainNamespace, "--ignore-not-found", "--timeout=110s"))
}

// awaitZero waits until the case's Functions have no Instance and as many wait as it starts at once.
func (s *kubernetesStarts) awaitZero(ctx context.Context) error {
	return poll(ctx, s.kase.patience(), fmt.Sprintf("%d warm instances and none that serves", s.kase.n), func() (bool, error) {
		var all struct {
			Items []struct {
				Metadata struct{ Name string } `json:"metadata"`
				Status   struct{ Ready, Starting, Desired int }
			} `json:"items"`
		}
		if err := s.get(ctx, resources+"/functions", &all); err != nil {
			return false, err
		}
		for _, f := range all.Items {
			if slices.Contains(s.functions, f.Metadata.Name) && (f.Status.Ready > 0 || f.Status.Starting > 0 || f.Status.Desired > 0) {
				return false, nil
			}
		}
		var pool struct {
			Status struct{ Warm, Desired int }
		}
		if err := s.get(ctx, resources+"/warmpools/bench", &pool); err != nil {
			return false, err
		}
		return pool.Status.Warm >= max(s.kase.n, pool.Status.Desired), nil
	})
}

// resources are where Hearth's own are, in the API.
const resources = "/apis/hearth.dev/v1alpha1/namespaces/" + namespace

// object is one of Hearth's resources.
func object(kind, name string, spec map[string]any) map[string]any {
	return map[string]any{
		"apiVersion": "hearth.dev/v1alpha1", "kind": kind, "metadata": map[string]any{"name": name, "namespace": namespace}, "spec": spec,
	}
}
