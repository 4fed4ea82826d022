package pool

import (
	"cmp"
	"context"
	"slices"
	"sync"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/durationpb"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
)

// importsTime bounds the wait for a node's word on imports, without which the others' are worth as much.
const importsTime = 3 * time.Second

// ListImports is RuntimeService's: what the nodes know, together.
func (m *Manager) ListImports(ctx context.Context, req *connect.Request[hearthv1.ListImportsRequest]) (*connect.Response[hearthv1.ListImportsResponse], error) {
	wanted := req.Msg.GetRuntime()
	generations, nodes := map[string]int64{}, map[string]Node{}
	m.mu.Lock()
	for name, r := range m.runtimes {
		if r.current != nil && (wanted == "" || wanted == name) {
			generations[name] = r.generation
		}
	}
	for name, n := range m.nodes {
		nodes[name] = n.client
	}
	m.mu.Unlock()
	if wanted != "" && len(generations) == 0 {
		return nil, noRuntime(wanted)
	}
	ctx, cancel := context.WithTimeout(ctx, importsTime)
	defer cancel()
	var mu sync.Mutex // guards what follows
	var said []*hearthv1.RuntimeImports
	out := &hearthv1.ListImportsResponse{}
	var asked sync.WaitGroup
	for name, n := range nodes {
		asked.Go(func() {
			list, err := n.ListImports(ctx, &hearthv1.ListImportsRequest{Runtime: wanted})
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				out.Silent++
				m.log.Debug("imports not told", "node", name, "err", err)
				return
			}
			for _, r := range list.GetRuntimes() { // of what has been replaced nobody wants to know
				if r.GetGeneration() == generations[r.GetRuntime()] {
					said = append(said, r)
				}
			}
		})
	}
	asked.Wait()
	if err := ctx.Err(); err != nil && len(nodes) > 0 && int(out.Silent) == len(nodes) {
		return nil, connect.NewError(codeOf(ctx), err)
	}
	out.Runtimes = sumImports(said)
	return connect.NewResponse(out), nil
}

// sumImports adds up what several nodes say, by Runtime.
func sumImports(said []*hearthv1.RuntimeImports) (out []*hearthv1.RuntimeImports) {
	modules := map[[2]string]*hearthv1.ModuleImports{} // by Runtime and name
	for _, r := range said {
		n := slices.IndexFunc(out, func(o *hearthv1.RuntimeImports) bool { return o.Runtime == r.GetRuntime() })
		if n < 0 {
			n = len(out)
			out = append(out, &hearthv1.RuntimeImports{Runtime: r.GetRuntime(), Generation: r.GetGeneration()})
		}
		sum := out[n]
		sum.Starts += r.GetStarts()
		sum.Functions = union(sum.Functions, r.GetFunctions())
		for _, told := range r.GetModules() {
			key := [2]string{r.GetRuntime(), told.GetName()}
			m := modules[key]
			if m == nil {
				m = &hearthv1.ModuleImports{Name: told.GetName(), InImage: told.GetInImage(), Total: &durationpb.Duration{}}
				modules[key] = m
				sum.Modules = append(sum.Modules, m)
			}
			m.Starts += told.GetStarts()
			m.Functions = union(m.Functions, told.GetFunctions())
			m.Total = durationpb.New(m.Total.AsDuration() + told.GetTotal().AsDuration())
		}
	}
	slices.SortFunc(out, func(x, y *hearthv1.RuntimeImports) int { return cmp.Compare(x.Runtime, y.Runtime) })
	for _, r := range out {
		slices.SortFunc(r.Modules, func(x, y *hearthv1.ModuleImports) int {
			return cmp.Or(cmp.Compare(y.Total.AsDuration(), x.Total.AsDuration()), cmp.Compare(x.Name, y.Name))
		})
	}
	return out
}

// union is of two sets of names, in their order.
func union(a, b []string) []string {
	all := slices.Concat(a, b)
	slices.Sort(all)
	return slices.Compact(all)
}
