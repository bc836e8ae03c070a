import pytest
from tests.nemo import reference
from tests.nemo.test_layouts import Layout, train
from tests.nemo.conftest import Workshop
L={"tp1":Layout(1),"pp2":Layout(2,{"pipeline":2}),"tp2":Layout(2,{"tensor":2}),"tp2seq":Layout(2,{"tensor":2,"sequence":True}),"tp2pp2":Layout(4,{"tensor":2,"pipeline":2})}
@pytest.mark.parametrize("fam",["qwen2","llama"])
@pytest.mark.parametrize("n",L)
def test_x(workshop: Workshop, n, fam):
    if fam=="llama" and n!="tp2pp2": pytest.skip("")
    run=train(workshop,"s"+n+fam,L[n],fam,max_steps=1)
    answers=run.answers(0)
    rows={a: workshop.train_rows[a] for a in answers}
    print("GN",fam,n,[r.gradient_norms[0] for r in run.ranks], reference.gradient_norm(workshop.model(fam),rows), run.losses[0], reference.means(workshop.sums(fam)[a] for a in answers)["loss"])
