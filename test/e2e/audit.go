package e2e

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	rbacv1 "k8s.io/api/rbac/v1"
)

// Right is something that may be asked of the API server. An empty namespace is all of them, or none to speak of; an empty name is any.
type Right struct {
	Verb, Group, Resource, Namespace, Name string // the resource with its subresource: pods/resize
}

// String is how people and tests read it: "patch pods/resize in hearth", "get leases.coordination.k8s.io hearth-poolmanager in hearth-system".
func (r Right) String() string {
	s := r.Verb + " " + r.Resource
	if resource, sub, ok := strings.Cut(r.Resource, "/"); ok && r.Group != "" {
		s = r.Verb + " " + resource + "." + r.Group + "/" + sub
	} else if r.Group != "" {
		s += "." + r.Group
	}
	if r.Name != "" {
		s += " " + r.Name
	}
	if r.Namespace != "" {
		s += " in " + r.Namespace
	}
	return s
}

// covers says whether who has this right may do what was done.
func (r Right) covers(done Right) bool {
	return r.Verb == done.Verb && r.Group == done.Group && r.Resource == done.Resource &&
		(r.Namespace == "" || r.Namespace == done.Namespace) && (r.Name == "" || r.Name == done.Name)
}

// Granted are the rights that objects (deploy.Objects) give to a ServiceAccount, one for each verb, resource and name in a rule.
func Granted(objects []map[string]any, namespace, account string) ([]Right, error) {
	roles, bindings := map[string][]rbacv1.PolicyRule{}, []rbacv1.RoleBinding{}
	for _, o := range objects {
		var err error
		switch kind, _ := o["kind"].(string); kind {
		case "Role", "ClusterRole":
			var role rbacv1.Role // a ClusterRole is the same without a namespace
			err = as(o, &role)
			roles[kind+" "+role.Namespace+"/"+role.Name] = role.Rules
		case "RoleBinding", "ClusterRoleBinding":
			var binding rbacv1.RoleBinding
			err = as(o, &binding)
			bindings = append(bindings, binding)
		}
		if err != nil {
			return nil, err
		}
	}
	var rights []Right
	for _, b := range bindings {
		if !slices.ContainsFunc(b.Subjects, func(s rbacv1.Subject) bool {
			return s.Kind == rbacv1.ServiceAccountKind && s.Namespace == namespace && s.Name == account
		}) {
			continue
		}
		of := b.Namespace
		if b.RoleRef.Kind == "ClusterRole" {
			of = ""
		}
		rules, ok := roles[b.RoleRef.Kind+" "+of+"/"+b.RoleRef.Name]
		if !ok {
			return nil, fmt.Errorf("binding %s is to %s %s, which is not there", b.Name, b.RoleRef.Kind, b.RoleRef.Name)
		}
		for _, r := range rules {
			rights = append(rights, each(r, b.Namespace)...)
		}
	}
	return rights, nil
}

func as(object map[string]any, to any) error {
	text, err := json.Marshal(object)
	if err != nil {
		return err
	}
	return json.Unmarshal(text, to)
}

// each is a rule's rights one by one.
func each(r rbacv1.PolicyRule, namespace string) []Right {
	names := r.ResourceNames
	if len(names) == 0 {
		names = []string{""}
	}
	var rights []Right
	for _, group := range r.APIGroups {
		for _, resource := range r.Resources {
			for _, verb := range r.Verbs {
				for _, name := range names {
					rights = append(rights, Right{verb, group, resource, namespace, name})
				}
			}
		}
	}
	return rights
}

const maxEventBytes = 4 << 20

// event is as much of audit.k8s.io/v1's as is needed.
type event struct {
	Stage, Verb string
	User        struct{ Username string }
	ObjectRef   *struct{ Resource, Subresource, Namespace, Name, APIGroup string }
}

// Asked are what a user has asked of the API server, from its audit log: one event of audit.k8s.io/v1 in JSON a line. Discovery,
// which everybody may do, is none of it. A last line that is not whole yet is left out.
func Asked(log io.Reader, user string) (map[Right]bool, error) {
	asked := map[Right]bool{}
	r := bufio.NewReaderSize(log, maxEventBytes)
	for line := 1; ; line++ {
		text, err := r.ReadSlice('\n')
		if errors.Is(err, io.EOF) {
			return asked, nil
		}
		var e event
		if err == nil {
			err = json.Unmarshal(text, &e)
		}
		if err != nil {
			return nil, fmt.Errorf("audit log, line %d: %w", line, err)
		}
		if e.User.Username != user || e.ObjectRef == nil || e.ObjectRef.Resource == "" {
			continue
		}
		o := e.ObjectRef
		right := Right{e.Verb, o.APIGroup, o.Resource, o.Namespace, o.Name}
		if o.Subresource != "" {
			right.Resource += "/" + o.Subresource
		}
		asked[right] = true
	}
}

// CompareRights says which rights that objects give to a ServiceAccount it has not used, and which it asked for without having them,
// by the API server's audit log. What a right is for has to have happened while the log was written.
func CompareRights(objects []map[string]any, namespace, account string, log io.Reader) (unused, missing []string, err error) {
	granted, err := Granted(objects, namespace, account)
	if err != nil {
		return nil, nil, err
	}
	asked, err := Asked(log, "system:serviceaccount:"+namespace+":"+account)
	if err != nil {
		return nil, nil, err
	}
	used := map[Right]bool{}
	for a := range asked {
		covered := false
		for _, g := range granted {
			if g.covers(a) {
				used[g], covered = true, true
			}
		}
		if !covered {
			missing = append(missing, a.String())
		}
	}
	for _, g := range granted {
		if !used[g] {
			unused = append(unused, g.String())
		}
	}
	slices.Sort(unused)
	slices.Sort(missing)
	return slices.Compact(unused), slices.Compact(missing), nil
}
